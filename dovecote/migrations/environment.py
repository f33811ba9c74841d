"""Alembic's environment, shared by the library and its applications: which schema, which tables, which version table.

`env.py` of the library and of an application call `migrate`; they differ in the tables they compare with.
"""

from collections.abc import Callable
from typing import Any

from alembic import context
from sqlalchemy import Connection, MetaData, text

from dovecote.database import SCHEMA
from dovecote.migrations.revisions import VERSION_TABLE
from dovecote.store.connections import connect


def migrate(metadata: MetaData, url: Callable[[], str]) -> None:
    """Run what Alembic was asked for, on the connection it was given or, without one, on a connection to `url()`."""
    given: Connection | None = context.config.attributes.get("connection")
    if given is not None:
        _migrate(given, metadata)
        return
    engine = connect(url(), statement_timeout_ms=0)
    with engine.connect() as connection:
        _migrate(connection, metadata)


def _migrate(connection: Connection, metadata: MetaData) -> None:
    ours = {table.name for table in metadata.tables.values()}

    def is_ours(_: Any, name: str | None, kind: str, _reflected: bool, _compare_to: Any) -> bool:
        # Partitions are made by dovecote.ensure_partitions, week by week; no model describes them.
        return kind != "table" or name in ours

    connection.execute(text(f"create schema if not exists {SCHEMA}"))
    # What a revision makes keeps the names that it finds: none is looked for where others may create something. And for
    # a login named like the schema, ours would be the default one, and the models' tables not found in it.
    connection.execute(text("set search_path = pg_catalog, pg_temp"))
    connection.commit()
    connection.dialect.default_schema_name = "public"
    context.configure(
        connection=connection,
        target_metadata=metadata,
        version_table=VERSION_TABLE,
        version_table_schema=SCHEMA,
        include_schemas=True,
        include_name=lambda name, kind, _: kind != "schema" or name == SCHEMA,
        include_object=is_ours,
        transaction_per_migration=True,
        # Comments are written in SQL, where a reader of the database finds them; the models do not repeat them.
        autogenerate_plugins=["alembic.autogenerate.*", "~alembic.autogenerate.comments"],
    )
    with context.begin_transaction():
        context.run_migrations()
