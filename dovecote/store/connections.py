"""Engines, connections and sessions on psycopg, as relay, consumers and commands have them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.orm import Session, sessionmaker

from dovecote.database import Sessions
from dovecote.store.watched import Connection, WatchedSession, given_back

#: What every session of ours begins with, whatever ALTER ROLE or ALTER DATABASE has set. psycopg reads timestamps and
#: intervals in one style each; and a pool's idle session, or a relay's in a quiet hour, must not be ended.
SESSION_SETTINGS: Mapping[str, object] = {
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "idle_session_timeout": 0,
    # The server's end: what a machine that lost its power has locked would otherwise stay locked for two hours.
    "tcp_keepalives_idle": 5,
    "tcp_keepalives_interval": 3,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": 14_000,
}

#: For sessions of relay, consumers and commands, whose work has limits of its own. Not for writers: how long a
#: business transaction may take, or wait for a lock, is for the service and its DBA to say.
NO_TIME_LIMITS: Mapping[str, object] = {
    "idle_in_transaction_session_timeout": 0,
    "lock_timeout": 0,
    "transaction_timeout": 0,
}

#: For sessions that run statements of ours only: each name of ours has its schema, so that nothing is looked up where
#: others may create something. Not for consumers, whose handlers may name tables of the service without a schema.
ONLY_OUR_NAMES: Mapping[str, object] = {"search_path": "pg_catalog,pg_temp"}

#: An SQL expression: from its statement on, the transaction at hand commits durably, where the server or the role says
#: `off`. Any other choice of a DBA, such as remote_apply or local, is kept. For the transaction: behind a pool of
#: transactions there is no session to set it for.
DURABLE = (
    "case when pg_catalog.current_setting('synchronous_commit') = 'off'"
    " then pg_catalog.set_config('synchronous_commit', 'on', true) end"
)

# By version: settings that an older server does not know. It would refuse a connection whose options name one.
_NEWER: Mapping[str, int] = {"transaction_timeout": 170_000}

_KEYWORDS = {option.keyword.decode() for option in Conninfo.get_defaults()}

#: How soon this end notices that the other is gone.
KEEPALIVES: Mapping[str, object] = {
    "keepalives_idle": 5,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 14_000,  # keepalives are silent while something sent is unanswered
}

# A connection that has been idle in the pool for longer is tried before it is handed out: a proxy may have closed it,
# or Postgres was restarted. In traffic that costs nothing; SQLAlchemy's `pool_pre_ping` would make each unit of
# work a quarter longer (60 of 240 us).
_PING_AFTER_SECONDS = 1.0


def connect(
    url: str,
    *,
    pool_size: int = 5,
    connect_timeout_seconds: int = 5,
    statement_timeout_ms: int = 30_000,
    application_name: str = "dovecote",
    session_settings: Mapping[str, object] | None = None,
    connect_args: Mapping[str, Any] | None = None,
) -> Engine:
    """Return an engine for `postgresql://...`; no connection is made yet.

    All that libpq reads in the URL is kept: TLS, several hosts, sockets, a service, `options`. Every session speaks UTC
    and UTF-8, and by TCP keepalives either end notices within about 15 s that the other is
    gone. `session_settings` are Postgres's own, such as {"lock_timeout": 5_000}.
    """
    settings = {**SESSION_SETTINGS, "statement_timeout": statement_timeout_ms, **(session_settings or {})}
    parameters = connection_parameters(
        url,
        settings,
        connect_timeout=connect_timeout_seconds,
        application_name=application_name,
        **KEEPALIVES,
    )
    parameters |= connect_args or {}
    engine = create_engine(
        _engine_url(url),
        pool_size=pool_size,
        max_overflow=0,
        # An error must not carry the row it failed on into a log or a delivery.
        hide_parameters=True,
        connect_args=connect_args or {},
    )

    @event.listens_for(engine, "do_connect")
    def opened(_dialect: object, _record: object, arguments: Sequence[Any], options: Mapping[str, Any]) -> Connection:
        # SQLAlchemy's own reading of the URL knows less than libpq's.
        own = {name: value for name, value in options.items() if name not in _KEYWORDS}
        connection = Connection.connect(*arguments, **{**own, **parameters})
        set_newer(connection, settings)
        return connection

    @event.listens_for(engine, "checkin")
    def returned(connection: Any, record: Any) -> None:
        record.info["returned_at"] = time.monotonic()
        given_back(connection, record)

    @event.listens_for(engine, "checkout")
    def taken(connection: Any, record: Any, _proxy: object) -> None:
        idle_since = record.info.get("returned_at")
        if idle_since is not None and time.monotonic() - idle_since > _PING_AFTER_SECONDS:
            try:
                engine.dialect.do_ping(connection)
            except psycopg.Error as error:
                raise DisconnectionError("ended while it was idle") from error  # the pool makes a new one

    return engine


def connection_parameters(url: str, settings: Mapping[str, object], **defaults: object) -> dict[str, Any]:
    """Return what psycopg.connect() takes for `postgresql://...`: all that the URL says, as libpq reads it.

    It wins over `defaults`. In `options` our `settings` come last and win; the text is UTF-8 whatever the URL says.
    Errors: psycopg.ProgrammingError for what libpq cannot read.
    """
    given = conninfo_to_dict(url.replace("postgresql+psycopg://", "postgresql://", 1))
    options = f"{given.pop('options', None) or ''} {startup_options(settings)}".strip()
    return {**defaults, **given, "client_encoding": "utf8", **({"options": options} if options else {})}


def _engine_url(url: str) -> URL:
    """Return what the engine shows of itself; SQLAlchemy cannot read several hosts with ports."""
    try:
        return make_url(url).set(drivername="postgresql+psycopg")
    except ValueError:
        return URL.create("postgresql+psycopg")


def startup_options(settings: Mapping[str, object]) -> str:
    """Return libpq's `options` for these settings, but for those that `set_newer` is for."""
    words = {name: str(value).replace(" ", "\\ ") for name, value in settings.items() if name not in _NEWER}
    return " ".join(f"-c {name}={value}" for name, value in words.items())


def set_newer(connection: psycopg.Connection[Any], settings: Mapping[str, object]) -> None:
    """Set what only newer servers know, on a connection that was just made, and only where it differs.

    Behind a pool of transactions the next client would have it too.
    """
    late = [name for name, version in _NEWER.items() if name in settings and connection.info.server_version >= version]
    if not late:
        return
    was_autocommit = connection.autocommit
    connection.autocommit = True
    for name in late:
        connection.execute(
            "select set_config(%(name)s, %(value)s, false) where current_setting(%(name)s) <> %(value)s",
            {"name": name, "value": str(settings[name])},
        )
    connection.autocommit = was_autocommit


def hears_notifications(
    connection: psycopg.Connection[Any], another: psycopg.Connection[Any], timeout_seconds: float
) -> bool:
    """Return whether `connection` hears a NOTIFY of another one: behind a pool of transactions it has no session.

    Errors: psycopg.errors.ProgramLimitExceeded when Postgres's queue of notifications is full.
    """
    channel = f"dovecote_{uuid4().hex}"
    connection.execute(f"listen {channel}")
    try:
        another.execute(f"notify {channel}")
    except psycopg.errors.ProgramLimitExceeded:
        connection.execute(f"unlisten {channel}")
        raise
    # A list: the generator holds the connection's lock until it has come to its end.
    heard = [one.channel for one in connection.notifies(timeout=timeout_seconds, stop_after=1)]
    if channel not in heard:
        return False
    connection.execute(f"unlisten {channel}")
    return True


def sessions_for(engine: Engine) -> Sessions:
    """Return the session factory that `unit_of_work` takes."""
    return sessionmaker(engine, class_=WatchedSession, expire_on_commit=False)


def driver_connection(session: Session) -> psycopg.Connection[Any]:
    """Return psycopg's connection below the session, in its transaction as far as one has begun there."""
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, psycopg.Connection), "a session on psycopg"
    return connection
