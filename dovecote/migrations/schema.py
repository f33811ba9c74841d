"""Bring the database's schema to a revision. The revisions point at SQL files; this runs them."""

import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psycopg
import structlog
from alembic import command, op
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dovecote.database import SCHEMA
from dovecote.errors import DovecoteError
from dovecote.store.connections import ONLY_OUR_NAMES, connect
from dovecote.telemetry.failures import is_transient

log = structlog.get_logger()

# Beside us in an installed wheel, at the top level in a checkout.
_PACKAGED = Path(__file__).parent / "migrations"
MIGRATIONS = _PACKAGED if _PACKAGED.exists() else Path(__file__).parents[2] / "migrations"


REVISION = "select version_num from dovecote.alembic_version"
WAITING = "waiting for the schema, which is older than this code: run `dovecote migrate`"


class SchemaError(DovecoteError):
    """The schema cannot be brought to where it was asked to go; the message says why."""


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


def upgrade(url: str, revision: str = "head") -> None:
    """Apply what is missing, each revision in a transaction of its own."""
    _with_connection(url, lambda config: command.upgrade(config, revision))


def downgrade(url: str, revision: str) -> None:
    """Take back revisions down to this one; "base" takes back all of them."""
    _with_connection(url, lambda config: command.downgrade(config, revision))


def steps(url: str, revision: str = "head") -> list[str]:
    """Return the revisions that `upgrade` would apply, in its order. Errors: SchemaError for an unknown revision."""
    every = revisions()
    until = len(every) if revision == "head" else every.index(_known(revision)) + 1
    return [one for one in pending_for(_applied(url)) if one in every[:until]]


def steps_back(url: str, revision: str) -> list[str]:
    """Return the revisions that `downgrade` would take back, in its order. Errors: SchemaError for an unknown one."""
    every, applied = revisions(), _applied(url)
    there = every[: every.index(applied) + 1] if applied in every else []
    kept = [] if revision == "base" else every[: every.index(_known(revision)) + 1]
    return [one for one in there[::-1] if one not in kept]


def _known(revision: str) -> str:
    if revision not in revisions():
        raise SchemaError(
            f"the schema cannot be migrated: there is no revision {revision}; the last is {revisions()[-1]}"
        )
    return revision


def _applied(url: str) -> str | None:
    """Return the revision that is applied, None before the first."""
    engine = connect(url, application_name="dovecote migrate", session_settings=ONLY_OUR_NAMES)
    try:
        with engine.connect() as connection:
            heads = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA}).get_current_heads()
        return heads[-1] if heads else None
    finally:
        engine.dispose()


def keep_strangers_out(url: str) -> None:
    """Let nobody into a database of our own server but those with a role of ours: others could take locks there."""
    engine = connect(url, application_name="dovecote migrate", session_settings=ONLY_OUR_NAMES)
    try:
        with engine.begin() as connection:
            # Without parameters a % is just itself for psycopg.
            connection.execution_options(no_parameters=True).exec_driver_sql(_KEEP_STRANGERS_OUT)
    finally:
        engine.dispose()


def pending(connection: Connection) -> list[str]:
    """Return the revisions that are not applied yet, oldest first; empty when the schema is up to date."""
    applied = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA}).get_current_heads()
    return pending_for(applied[-1] if applied else None)


def pending_for(applied: str | None) -> list[str]:
    """Return the revisions above this one, oldest first; none where a newer deploy's is one we do not know."""
    every = revisions()
    if applied is None:
        return every
    return every[every.index(applied) + 1 :] if applied in every else []


@cache
def revisions() -> list[str]:
    """Return all that this code knows, oldest first. The first call reads and imports each of them."""
    script = ScriptDirectory.from_config(_config())
    return [revision.revision for revision in script.walk_revisions()][::-1]


def await_current(engine: Engine, stopping: threading.Event) -> bool:
    """Wait until the schema is as new as this code, and say so meanwhile; False when told to stop before.

    Errors: DBAPIError when there is no schema at all.
    """
    tries = 0
    while wanted := _wanted(engine):
        if tries % 60 == 0:
            log.warning(WAITING, newest=wanted)
        tries += 1
        if stopping.wait(1.0):
            return False
    return True


def _wanted(engine: Engine) -> str | None:
    """Return the newest revision while it is not applied, None once it is; `postgres` while that is away."""
    try:
        with engine.connect() as connection:
            waiting = pending_for(connection.exec_driver_sql(REVISION).scalar_one_or_none())
    except DBAPIError as error:
        if is_transient(error):
            return "postgres itself"
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):  # a revision that does not show it yet
            waiting = pending_for(None)
        else:
            raise
    return waiting[-1] if waiting else None


def run(file: str) -> None:
    """Run a file of SQL statements as the migrating login. For revisions."""
    _execute((MIGRATIONS / "sql" / file).read_text())


def run_as_owner(file: str) -> None:
    """Run a file of SQL statements so that what it makes belongs to dovecote_owner. For revisions."""
    _execute("set local role dovecote_owner")
    run(file)
    _execute("reset role")


def _execute(sql: str) -> None:
    # Without parameters psycopg sends the file as one script, and a % or a colon in it is just itself.
    op.get_bind().execution_options(no_parameters=True).exec_driver_sql(sql)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


def _with_connection(url: str, work: Callable[[Config], None]) -> None:
    engine = connect(url, statement_timeout_ms=0, application_name="dovecote migrate", session_settings=ONLY_OUR_NAMES)
    try:
        with engine.connect() as connection:
            config = _config()
            config.attributes["connection"] = connection
            work(config)
    except CommandError as error:
        raise SchemaError(f"the schema cannot be migrated: {error}") from error
    finally:
        engine.dispose()
