"""Does the relay get on? A checkpoint may stand still for an open transaction; an event may not."""

import time
from typing import Any

import psycopg

from workers.operations.doctor.finding import Finding, error, ok

Connection = psycopg.Connection[Any]

_LONG_SECONDS = 30.0
# What an old transaction has just committed looks old, and is published by then.
_LOOK_AGAIN_SECONDS = 2.0

# Positions from the checkpoint on that are in no batch, gap by gap, and the first of each that has a row. Bounded: the
# relay publishes in order, so what it stands still at is the first row in one of the first gaps, or the first row
# above everything published. Gaps without a row are transactions that are open or were rolled back.
_OLDEST_UNPUBLISHED = """
    with state as materialized (
        select s.checkpoint, h.last_position
        from dovecote.relay_state s, dovecote.horizon() h
    ), gaps as (
        select unnest(int8multirange(int8range(checkpoint, last_position, '(]')) - coalesce(
            (select range_agg(b.positions) from dovecote.published_batches b
             where b.positions && int8multirange(int8range(checkpoint, last_position, '(]'))), '{}')) as gap
        from state where last_position > checkpoint
    )
    select o.position, o.id, extract(epoch from clock_timestamp() - o.created_at)::float8 as seconds
    from (select gap from gaps order by gap limit %(most)s) as gaps
    cross join lateral (
        select position, id, created_at from dovecote.outbox
        where position >= lower(gap) and position < upper(gap) order by position limit 1) o
    order by o.created_at limit 1
"""
_MOST_GAPS = 25_000


def relay(connection: Connection) -> Finding:
    """Look for an event that is committed, can be read, and is not published for a long time."""
    row = _oldest(connection)
    if row is not None and row.seconds > _LONG_SECONDS:
        time.sleep(_LOOK_AGAIN_SECONDS)
        again = _oldest(connection)
        if again is not None and again.position == row.position:
            found = f"event {again.id} at position {again.position} is {again.seconds:.0f} s old and not published"
            return error(
                "relay.progress",
                found,
                "The relay is behind, or stands still at this event. `dovecote status --watch` shows whether the "
                "events it has published grow; if not, its log says what it stumbles over.",
            )
        row = again
    if row is None:
        return ok("relay.progress", "each event is published")
    return ok("relay.progress", f"the oldest event that is not published is {max(0.0, row.seconds):.0f} s old")


def _oldest(connection: Connection) -> Any:
    return connection.execute(_OLDEST_UNPUBLISHED, {"most": _MOST_GAPS}).fetchone()
