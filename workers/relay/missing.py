"""What Redis may have lost: published, but neither processed nor in `deliveries`.

Whole batches are cut into bundles exactly as they were when they were published first, so a bundle that
is still queued is not queued twice.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

from workers.broker import QueuedBundle
from workers.relay.bundles import Bundler
from workers.relay.envelopes import Read, Row
from workers.relay.reading import Connection, Reader
from workers.relay.setting_aside import Unreadable
from workers.routes import Route

_MISSING = """
    select o.position from dovecote.outbox o
    join dovecote.subscriptions s on s.handler_name = %(handler)s and s.event_type = o.event_type
    where o.event_type = any(%(event_types)s) and o.position > s.since_position
      and not s.published_above @> o.position and o.position <= %(frontier)s
      and not exists (select from dovecote.processed_events p
                      where p.event_id = o.id and p.handler_name = %(handler)s)
      and not exists (select from dovecote.deliveries d
                      where d.event_id = o.id and d.handler_name = %(handler)s)
"""

_BATCHES_OF = """
    select distinct on (b.published_at, b.positions) b.positions::text
    from unnest(%s::bigint[]) as missing (position)
    join dovecote.published_batches b on b.positions @> missing.position
    order by b.published_at, b.positions
"""


def bundles(
    connection: Connection,
    reader: Reader,
    bundler: Bundler,
    routes: Sequence[Route],
    set_aside: Callable[[Sequence[Unreadable]], None],
    upto: Mapping[str, int],
) -> Iterator[QueuedBundle]:
    """Yield the messages to send again, batch by batch; to the handlers of `upto` only what lies up to there.

    Rows that cannot be read any more are given to `set_aside`.
    """
    with connection.transaction():
        # The whole history is asked here; the relay's guard for reading by index would be in the way.
        connection.execute("set local enable_seqscan = on; set local enable_sort = on")
        missing = {
            route.handler: _missing(connection, route, min(reader.frontier, upto.get(route.handler, reader.frontier)))
            for route in routes
        }
        positions = sorted(set().union(*missing.values()))
        batches = batches_of(connection, positions)
    for batch in batches:
        rows = _readable(reader.slices_in(batch), bundler, missing, set_aside)
        for bundle, inside in bundler.bundles_with_positions(rows, upto):
            if not missing[bundle.handler].isdisjoint(inside):
                yield bundle


def _readable(
    slices: Iterable[Read],
    bundler: Bundler,
    missing: Mapping[str, Set[int]],
    set_aside: Callable[[Sequence[Unreadable]], None],
) -> Iterator[Row]:
    for found in slices:
        set_aside(
            [
                Unreadable(route.handler, position, found.problems[position])
                for position, event_type, _ in (found.rows if found.problems else ())
                if position in found.problems
                for route in bundler.routes_for(event_type)
                if position in missing[route.handler]
            ]
        )
        yield from found.rows


def batches_of(connection: Connection, positions: Sequence[int]) -> list[str]:
    """Return the batches that brought these positions, as multiranges, in the order they were published."""
    return [str(text) for (text,) in connection.execute(_BATCHES_OF, (list(positions),))]


def _missing(connection: Connection, route: Route, frontier: int) -> set[int]:
    found = connection.execute(
        _MISSING, {"handler": route.handler, "event_types": route.event_types, "frontier": frontier}
    )
    return {position for (position,) in found}
