"""Check that relay and handlers make progress. An open transaction may hold the checkpoint, but not an event."""

import time
from collections.abc import Sequence
from typing import Any

import psycopg

from dovecote.operations.doctor.finding import Finding, error, ok, warning
from dovecote.route import Route

Connection = psycopg.Connection[Any]

_LONG_SECONDS = 30.0
# What an old transaction has just committed looks old, and is published by then.
_SECOND_CHECK_SECONDS = 2.0

# Positions from the checkpoint on that are in no batch, gap by gap, and the first of each that has a row. Bounded: the
# relay publishes in order, so the row that stops it is the first row in one of the first gaps, or the first row
# above everything published. Gaps without a row are transactions that are open or were rolled back.
_OLDEST_UNPUBLISHED = """
    with state as materialized (
        select s.checkpoint, h.last_position
        from dovecote.relay_state s, dovecote.low_watermark() h
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
_MAX_GAPS = 25_000

# As the alert DovecoteHandlerBehind.
_BEHIND_SECONDS = 900.0
# Exact up to here, as in `status`.
_MAX_EVENTS = 20_000

# What is in `deliveries` has checks of its own.
_BEFORE_HANDLERS = """
    select p.handler_name, u.events, u.at_least, extract(epoch from clock_timestamp() - u.oldest)::float8 as seconds,
           exists (select from dovecote.paused_handlers h where h.handler_name = p.handler_name) as is_paused
    from dovecote.progress p
    cross join lateral dovecote.unprocessed(p.handler_name, %(most)s) u
    where p.handler_name = any(%(handlers)s) and u.events > 0
    order by seconds desc
"""


def handlers(connection: Connection, routes: Sequence[Route]) -> Finding:
    """Look for a handler without progress, however many events others process."""
    names = [route.handler for route in routes]
    rows = connection.execute(_BEFORE_HANDLERS, {"handlers": names, "most": _MAX_EVENTS}).fetchall()
    described = ", ".join(
        f"{row.handler_name} has {'at least ' if row.at_least else ''}{row.events:,} events before it, the oldest "
        f"{row.seconds:,.0f} s old{' (paused)' if row.is_paused else ''}"
        for row in rows
    )
    if any(row.seconds > _BEHIND_SECONDS and not row.is_paused for row in rows):
        return warning(
            "handlers.progress",
            described,
            "It is too slow, has too few workers, or none: `dovecote status --watch` shows whether it gets on, and "
            "queues.served whether anybody serves its queue.",
        )
    return ok("handlers.progress", described or "no handler has an event before it")


def relay(connection: Connection) -> Finding:
    """Look for an event that is committed, can be read, and is not published for a long time."""
    row = _oldest(connection)
    if row is not None and row.seconds > _LONG_SECONDS:
        time.sleep(_SECOND_CHECK_SECONDS)  # what was on its way is published by then
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
    return connection.execute(_OLDEST_UNPUBLISHED, {"most": _MAX_GAPS}).fetchone()
