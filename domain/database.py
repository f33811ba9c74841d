"""Engines, sessions and the one MetaData every table hangs on.

Everything lives in the Postgres schema `dovecote`, so it shares a database with a service's own tables
without sharing their names.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import DateTime, Engine, MetaData, Uuid, create_engine, make_url
from sqlalchemy.event import listen
from sqlalchemy.orm import Session, registry, sessionmaker

from domain.connections import Connection, WatchedSession

SCHEMA = "dovecote"

metadata = MetaData(
    schema=SCHEMA,
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ix": "%(table_name)s_%(column_0_name)s_idx",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
    },
)

# Aggregates stay plain dataclasses; their repositories map them here.
mapper = registry(metadata=metadata, type_annotation_map={datetime: DateTime(timezone=True), UUID: Uuid})

Sessions = sessionmaker[Session]

# The server's end: what a machine that lost its power has locked would otherwise stay locked for two hours.
_KEEPALIVES = {
    "tcp_keepalives_idle": 5,
    "tcp_keepalives_interval": 3,
    "tcp_keepalives_count": 3,
    "tcp_user_timeout": 14_000,
}


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

    Every session speaks UTC, and by TCP keepalives either end notices within about 15 s that the other is gone.
    `session_settings` are Postgres's own, such as {"lock_timeout": 5_000}.
    """
    settings = {"timezone": "UTC", "statement_timeout": statement_timeout_ms, **_KEEPALIVES, **(session_settings or {})}
    engine = create_engine(
        make_url(url).set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=0,
        # An error must not carry the row it failed on into a log or a delivery.
        hide_parameters=True,
        connect_args={
            "connect_timeout": connect_timeout_seconds,
            "application_name": application_name,
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
            "keepalives_idle": 5,
            "keepalives_interval": 3,
            "keepalives_count": 3,
            "tcp_user_timeout": 14_000,  # keepalives are silent while something sent is unanswered
            **(connect_args or {}),
        },
    )
    listen(engine, "do_connect", _open)
    return engine


def _open(_dialect: object, _record: object, arguments: Sequence[Any], options: Mapping[str, Any]) -> Connection:
    return Connection.connect(*arguments, **options)


def sessions_for(engine: Engine) -> Sessions:
    """Return the session factory that `unit_of_work` takes."""
    return sessionmaker(engine, class_=WatchedSession, expire_on_commit=False)


def driver_connection(session: Session) -> Connection:
    """Return psycopg's connection below the session, in its transaction as far as one has begun there."""
    connection = session.connection().connection.driver_connection
    assert isinstance(connection, Connection), "a session of `connect`"
    return connection


def array(values: Iterable[object]) -> str:
    """Return a Postgres array literal, to be cast to the array's type: array(["a", 1]) is {"a","1"}.

    psycopg writes a list element by element in Python; this is five times as quick. No value may be None
    or contain a NUL, which Postgres keeps nowhere.
    """
    texts = list(map(str, values))
    if not texts:
        return "{}"
    return '{"' + "\0".join(texts).replace("\\", "\\\\").replace('"', '\\"').replace("\0", '","') + '"}'


def uuid_array(values: Iterable[UUID]) -> str:
    """Return a Postgres array literal, to be cast to uuid[]. With dashes it would take six times as long."""
    return "{" + ",".join([value.hex for value in values]) + "}"
