"""Engines as the settings want them."""

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg.types.json import set_json_loads
from sqlalchemy import Engine
from sqlalchemy.event import listen

from dovecote.envelope.stored_json import read_stored
from dovecote.settings import Settings
from dovecote.store.connections import NO_TIME_LIMITS, ONLY_OUR_NAMES, connect
from dovecote.store.loaders import loads_anything


def engine_for(settings: Settings, application_name: str, **session_settings: object) -> Engine:
    """Return an engine with the settings' pool and time-outs, whatever those of the role or the database are."""
    database = settings.database
    engine = connect(
        database.url.get_secret_value(),
        pool_size=database.pool_size,
        connect_timeout_seconds=database.connect_timeout_seconds,
        statement_timeout_ms=database.statement_timeout_ms,
        application_name=application_name,
        session_settings={**NO_TIME_LIMITS, **session_settings},
    )
    # Postgres keeps numbers and nestings that Python's own parser refuses with an error.
    listen(engine, "connect", lambda connection, _: set_json_loads(read_stored, connection))
    return engine


@contextmanager
def engine_during(settings: Settings) -> Iterator[Engine]:
    """Yield an engine for a command and dispose of it afterwards."""
    engine = loads_anything(engine_for(settings, "dovecote cli", **ONLY_OUR_NAMES))
    try:
        yield engine
    finally:
        engine.dispose()
