"""Bring a database to a revision, and say which revisions it lacks.

There are two branches in one version table: the library's revisions, in here, and those of an application, which stand
on them. `locations` names the directories of the latter (`app.migration_locations`): each has `versions/` and `sql/`,
as this one. Without any, the library's revisions are all there are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection

from dovecote.database import SCHEMA
from dovecote.migrations.revisions import LIBRARY, VERSION_TABLE, SchemaError, pending_for, revisions
from dovecote.store.connections import ONLY_OUR_NAMES, connect

_KEEP_STRANGERS_OUT = """
    do $$
    declare
        given text;
    begin
        execute pg_catalog.format('revoke connect, temporary on database %I from public', current_database());
        select pg_catalog.string_agg(pg_catalog.quote_ident(r.rolname), ', ') into given
        from pg_catalog.pg_roles r
        where r.rolname = any(array['dovecote_owner', 'dovecote_writer', 'dovecote_worker', 'dovecote_operator',
                                    'dovecote_viewer', 'dovecote_service']);
        execute pg_catalog.format('grant connect on database %I to ', current_database()) || given;
    end $$
"""


def upgrade(url: str, revision: str = "heads", *, locations: Sequence[Path]) -> None:
    """Apply what is missing, each revision in a transaction of its own. Errors: SchemaError."""
    revisions(locations=locations)  # what relays and consumers could not read is not applied
    _with_connection(url, locations, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str, *, locations: Sequence[Path]) -> None:
    """Downgrade to this revision; "base" removes all revisions, "application@base" the application's."""
    _with_connection(url, locations, lambda config: command.downgrade(config, revision))


def steps(url: str, revision: str = "heads", *, locations: Sequence[Path]) -> list[str]:
    """Return the revisions that `upgrade` would apply, in its order. Errors: SchemaError for an unknown revision."""
    return _above(_applied(url), tuple(locations), revision)


def steps_back(url: str, revision: str, *, locations: Sequence[Path]) -> list[str]:
    """Return the revisions that `downgrade` would remove, in its order. Errors: SchemaError for an unknown one."""
    applied: Any = _applied(url)
    with _one_sentence():
        # Alembic has no public name, and no type for several heads, for what `downgrade` goes through.
        return [step.revision.revision for step in _script(tuple(locations))._downgrade_revs(revision, applied)]


def pending(connection: Connection, *, locations: Sequence[Path]) -> list[str]:
    """Return the revisions that are not applied yet, in their order; empty when the schema is up to date."""
    return pending_for(_heads(connection), locations=locations)


def keep_strangers_out(url: str) -> None:
    """Let nobody into a database of our own server but those with a role of ours: others could take locks there."""
    engine = connect(url, application_name="dovecote migrate", session_settings=ONLY_OUR_NAMES)
    try:
        with engine.begin() as connection:
            # Without parameters a % is just itself for psycopg.
            connection.execution_options(no_parameters=True).exec_driver_sql(_KEEP_STRANGERS_OUT)
    finally:
        engine.dispose()


def _above(applied: tuple[str, ...], locations: tuple[Path, ...], revision: str = "heads") -> list[str]:
    with _one_sentence():
        found = _script(locations).iterate_revisions(revision, applied, implicit_base=True)
        return [one.revision for one in found][::-1]


def _applied(url: str) -> tuple[str, ...]:
    engine = connect(url, application_name="dovecote migrate", session_settings=ONLY_OUR_NAMES)
    try:
        with engine.connect() as connection:
            return _heads(connection)
    finally:
        engine.dispose()


def _heads(connection: Connection) -> tuple[str, ...]:
    options = {"version_table": VERSION_TABLE, "version_table_schema": SCHEMA}
    return MigrationContext.configure(connection, opts=options).get_current_heads()


@cache
def _script(locations: tuple[Path, ...]) -> ScriptDirectory:
    return ScriptDirectory.from_config(_config(locations))


def _config(locations: Sequence[Path]) -> Config:
    config = Config()
    config.set_main_option("script_location", str(LIBRARY))
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", "\n".join(str(path / "versions") for path in (LIBRARY, *locations)))
    return config


def _with_connection(url: str, locations: Sequence[Path], work: Callable[[Config], None]) -> None:
    engine = connect(url, statement_timeout_ms=0, application_name="dovecote migrate", session_settings=ONLY_OUR_NAMES)
    try:
        with engine.connect() as connection, _one_sentence():
            config = _config(locations)
            config.attributes["connection"] = connection
            work(config)
    finally:
        engine.dispose()


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except (CommandError, RevisionError) as error:
        raise SchemaError(f"the schema cannot be migrated: {error}") from error
