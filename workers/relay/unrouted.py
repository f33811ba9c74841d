"""Events that no handler wants: they stay in the outbox, and what the relay met is noted by type.

A newer writer's version is among them until code is deployed that knows it: then it is sent (see `Relay._subscribe`).
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from workers.relay.reading import Connection, Row

_NOTE = """
    insert into dovecote.unrouted_types as known (event_type, events, first_position, last_position)
    select event_type, count(*), min(position), max(position)
    from unnest(%s::text[], %s::bigint[]) as met (event_type, position) group by event_type
    on conflict (event_type) do update set
        events = known.events + excluded.events, last_seen_at = clock_timestamp(),
        first_position = least(known.first_position, excluded.first_position),
        last_position = greatest(known.last_position, excluded.last_position)
"""


def note(connection: Connection, routed: AbstractSet[str], rows: Sequence[Row]) -> None:
    """Write down the types among these rows that are not routed. Rows published twice count twice."""
    if {event_type for _, event_type, _ in rows} <= routed:
        return  # the usual case, at a microsecond for twenty rows
    met = [(event_type, position) for position, event_type, _ in rows if event_type not in routed]
    connection.execute(_NOTE, ([event_type for event_type, _ in met], [position for _, position in met]))
