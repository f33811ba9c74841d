"""Alembic's entry: which database, which schema, which tables are ours."""

from typing import Any

from alembic import context
from sqlalchemy import Connection, text

from domain.tables import metadata
from dovecote.database import SCHEMA
from dovecote.store.connections import connect


def _is_ours(thing: Any, name: str | None, kind: str, _reflected: bool, _compare_to: Any) -> bool:
    if kind == "table":
        # Partitions are made by dovecote.ensure_partitions, week by week; no model describes them.
        return name in {table.name for table in metadata.tables.values()}
    return True


def _migrate(connection: Connection) -> None:
    connection.execute(text(f"create schema if not exists {SCHEMA}"))
    # What a revision makes keeps the names that it finds: none is looked for where others may create something. And for
    # a login named like the schema, ours would be the default one, and the models' tables not found in it.
    connection.execute(text("set search_path = pg_catalog, pg_temp"))
    connection.commit()
    connection.dialect.default_schema_name = "public"
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=lambda name, kind, _: kind != "schema" or name == SCHEMA,
        include_object=_is_ours,
        transaction_per_migration=True,
        # Comments are written in SQL, for whoever looks into the database; the models do not repeat them.
        autogenerate_plugins=["alembic.autogenerate.*", "~alembic.autogenerate.comments"],
    )
    with context.begin_transaction():
        context.run_migrations()


def _main() -> None:
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        _migrate(given)
        return
    from dovecote.settings import load_settings  # only the command line needs it

    engine = connect(load_settings().database.url.get_secret_value(), statement_timeout_ms=0)
    with engine.connect() as connection:
        _migrate(connection)


_main()
