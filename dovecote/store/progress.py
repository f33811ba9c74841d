"""The table `progress`: each handler's low-water mark, and the ranges above it in which anything may be unfinished.

What the marks mean, and why they hold, is written beside the SQL function that moves them. A range may contain events
that the handler does not want.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dovecote.store.envelopes import Connection

# More than a batch can have (DOVECOTE_RELAY__BATCH_SIZE): the positions are the bound.
_ALL = 1_000_000

_MOVE = "select has_moved, is_behind, is_open from dovecote.move_low_water_marks(%s, %s)"

# Where anything can be missing: in what is open, and above what was examined. `published_above` of a new handler is
# excluded with the events themselves.
_OPEN_RANGES = """
    select coalesce(range_agg(part.ranges), '{}')::text
    from unnest(%(handlers)s::text[], %(uptos)s::bigint[]) as wanted (handler, upto)
    left join dovecote.progress p on p.handler_name = wanted.handler
    left join lateral (select min(since_position) as since from dovecote.subscriptions
                       where handler_name = wanted.handler) s on true
    cross join lateral (
        select (coalesce(p.open, '{}') + int8multirange(int8range(coalesce(p.examined, s.since), null, '()')))
               * int8multirange(int8range(null, wanted.upto, '(]')) as ranges) as part
    where coalesce(p.examined, s.since) is not null
"""

# Which handlers have anything open, and where. Not to be searched: a handler whose messages are held or postponed, and
# one whose events a replay sends. None is while the leader sends again what Redis has lost.
_OPEN_HANDLERS = """
    select p.handler_name, (p.open + int8multirange(int8range(p.examined, greatest(p.examined, %(upto)s), '(]')))::text,
           p.low_water_mark + 1,
           exists (select from dovecote.relay_state where epoch = %(epoch)s and redis_run_id is not null)
           and not exists (select from dovecote.paused_handlers h where h.handler_name = p.handler_name)
           and not exists (select from dovecote.postponed h where h.handler_name = p.handler_name)
           and not exists (select from dovecote.replays r where r.handler_name = p.handler_name
                             and r.mode = 'backfill' and r.state in ('pending', 'running'))
    from dovecote.progress p
    where p.handler_name = any(%(handlers)s) and (not isempty(p.open) or p.examined < %(upto)s)
"""

# Of the first events in these ranges, what handlers have not finished. dovecote.outstanding_of returns ranges, in which
# there may be events that a handler does not want, and counts versions that it does not know yet.
_UNFINISHED = """
    with look as materialized (
        select * from dovecote.events_in(
            %(ranges)s::int8multirange * int8multirange(int8range(%(begin)s, null)), %(events)s)
    ), unfinished as materialized (
        select u.handler_name, u.ranges from look
        cross join lateral dovecote.outstanding_of(%(handlers)s::text[], look.positions, look.ids, look.types) u
    ), wanted as materialized (
        select s.handler_name, s.event_type, s.since_position, s.published_above, u.ranges
        from unfinished u join dovecote.subscriptions s on s.handler_name = u.handler_name
    )
    select w.handler_name, array_agg(found.position order by found.position)
    from look
    cross join lateral unnest(look.positions, look.types) as found (position, event_type)
    join wanted w on w.event_type = found.event_type
    where w.ranges @> found.position and found.position > w.since_position
      and not w.published_above @> found.position
    group by 1
"""


class Moved(NamedTuple):
    """What one step did.

    has_moved  a mark, or what is open above it, has changed
    is_behind  more can be examined at once
    is_open    something is unfinished above a mark
    """

    has_moved: bool
    is_behind: bool
    is_open: bool


class OpenHandler(NamedTuple):
    """A handler with something open: the ranges in which it may be, from `low` on.

    is_due  it may be searched for lost messages
    """

    handler: str
    ranges: str
    low: int
    is_due: bool


def move_low_water_marks(connection: Connection, epoch: int, published_upto: int) -> Moved:
    """Move the low-water marks of all handlers by one step."""
    row = connection.execute(_MOVE, (epoch, published_upto)).fetchone()
    assert row is not None, "the function returns one row"
    return Moved(*row)


def open_ranges(connection: Connection, uptos: Sequence[tuple[str, int]]) -> str:
    """Return the ranges, as a multirange literal, in which anything may be open for these handlers, each up to its own
    position."""
    fields: dict[str, Any] = {"handlers": [name for name, _ in uptos], "uptos": [upto for _, upto in uptos]}
    (text,) = connection.execute(_OPEN_RANGES, fields).fetchone() or ("{}",)
    return str(text)


def open_handlers(connection: Connection, handlers: Sequence[str], upto: int, epoch: int) -> list[OpenHandler]:
    """Return the handlers with anything open up to this position."""
    fields = {"handlers": list(handlers), "upto": upto, "epoch": epoch}
    return [OpenHandler(*row) for row in connection.execute(_OPEN_HANDLERS, fields)]


def unfinished(
    connection: Connection, handlers: Sequence[str], ranges: str, begin: int = 0, events: int = _ALL
) -> dict[str, list[int]]:
    """Return the positions that the handlers want and have not finished: neither processed nor in `deliveries`.

    Of the first so many events in these ranges, in order. `ranges` is a multirange literal, of which only what is at
    `begin` and above counts. A handler with nothing unfinished is not in the answer.
    """
    fields = {"handlers": list(handlers), "ranges": ranges, "begin": begin, "events": events}
    return dict(connection.execute(_UNFINISHED, fields).fetchall())
