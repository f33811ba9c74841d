"""Events that no handler wants: they stay in the outbox, and what the relay met is noted by type.

A newer writer's version is among them until code is deployed that knows it: then it is sent (see `Relay._subscribe`).
A writer may invent types without end. The ones met last are kept, at most MAX_TYPES of them.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from dovecote.store.reader import Connection, Row

#: Types that are kept in the database. Each costs a row; a look at the status reads them all.
MAX_TYPES = 1_000

_NOTE = """
    insert into dovecote.unrouted_types as known (event_type, events, first_position, last_position)
    select * from unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[])
    on conflict (event_type) do update set
        events = known.events + excluded.events, last_seen_at = clock_timestamp(),
        first_position = least(known.first_position, excluded.first_position),
        last_position = greatest(known.last_position, excluded.last_position)
"""

_FORGET_OLDEST = """
    delete from dovecote.unrouted_types where event_type in (
        select event_type from dovecote.unrouted_types order by last_seen_at desc, last_position desc offset %s)
"""


class Unrouted:
    """Counts what a leadership meets, and writes it down now and then: a row a batch would be a version a batch."""

    def __init__(self, routed: AbstractSet[str]) -> None:
        self._routed = routed
        self._met: dict[str, tuple[int, int, int]] = {}
        self._written: set[str] = set()

    def meet(self, rows: Sequence[Row]) -> None:
        """Count the types among these rows that are not routed. Rows published twice count twice."""
        if {event_type for _, event_type, _ in rows} <= self._routed:
            return  # the usual case, at a microsecond for twenty rows
        for position, event_type, _ in rows:
            if event_type not in self._routed:
                events, first, last = self._met.get(event_type, (0, position, position))
                self._met[event_type] = (events + 1, min(first, position), max(last, position))

    @property
    def has_news(self) -> bool:
        """Whether a type was met that this leadership has not written down yet. It should: a crash would hide it."""
        return not self._met.keys() <= self._written

    def write(self, connection: Connection) -> None:
        """Write down what was met since the last time."""
        if self._met:
            events, first, last = zip(*self._met.values(), strict=True)
            connection.execute(_NOTE, (list(self._met), list(events), list(first), list(last)))
            if self.has_news:
                connection.execute(_FORGET_OLDEST, (MAX_TYPES,))
                if len(self._written) > MAX_TYPES:
                    self._written.clear()
            self._written |= self._met.keys()
            self._met.clear()
