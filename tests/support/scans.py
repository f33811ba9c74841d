"""How often Postgres has read a large table from end to end: never, for a listing."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import Engine

_SCANS = """
    select coalesce(sum(seq_scan), 0)::int from pg_stat_user_tables
    where schemaname = 'dovecote' and relname ~ '^(outbox|processed_events|published_batches)'
"""


@contextmanager
def no_whole_table_is_read(engine: Engine) -> Iterator[None]:
    """Fail if outbox, processed_events or published_batches is scanned within the block."""
    before = _scans(engine)
    yield
    assert _scans(engine) == before, "a large table was read from end to end"


def _scans(engine: Engine) -> int:
    # A session hands in its numbers when it ends.
    engine.dispose()
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.execute("select pg_stat_clear_snapshot()")
        (scans,) = connection.execute(_SCANS).fetchone() or (0,)
        return int(scans)
