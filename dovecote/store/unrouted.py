"""Events that no handler wants: they stay in the outbox, and the relay counts them by type.

A newer writer's version is among them until code is deployed that knows it: then it is sent (see `Relay._subscribe`).
A writer may invent any number of types. The latest are kept, at most MAX_TYPES of them.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import sqlalchemy
from sqlalchemy import text

if TYPE_CHECKING:
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

_UNROUTED = text(
    """
    select u.event_type, u.events, u.first_position, u.last_position, u.first_seen_at, u.last_seen_at,
           coalesce((select array_agg(distinct s.handler_name order by s.handler_name) from dovecote.subscriptions s
                     where dovecote.event_name(s.event_type) = dovecote.event_name(u.event_type)), '{}') as wanted_by
    from dovecote.unrouted_types u
    where not exists (select from dovecote.subscriptions s where s.event_type = u.event_type)
    order by u.last_seen_at desc, u.last_position desc limit :most
    """
)


@dataclass(frozen=True)
class UnroutedType:
    """An event type that the relay has met and no handler subscribes to.

    events     how many, about: an event published twice counts twice
    wanted_by  handlers of another version of this event: deploy code that knows this version, and they get it
    """

    event_type: str
    events: int
    first_position: int
    last_position: int
    first_seen_at: datetime
    last_seen_at: datetime
    wanted_by: list[str]


def list_unrouted(connection: sqlalchemy.Connection) -> list[UnroutedType]:
    """Return the types that no handler subscribes to, the one met last first: at most MAX_TYPES."""
    return [UnroutedType(**row._mapping) for row in connection.execute(_UNROUTED, {"most": MAX_TYPES})]


class Unrouted:
    """Counts unrouted events in memory, and writes the counts now and then: a write per batch would bloat the table."""

    def __init__(self, routed: AbstractSet[str]) -> None:
        self._routed = routed
        self._met: dict[str, tuple[int, int, int]] = {}
        self._written: set[str] = set()

    def meet(self, rows: "Sequence[Row]") -> None:
        """Count the types among these rows that are not routed. Rows published twice count twice."""
        if {event_type for _, event_type, _ in rows} <= self._routed:
            return  # the usual case, at a microsecond for twenty rows
        for position, event_type, _ in rows:
            if event_type not in self._routed:
                events, first, last = self._met.get(event_type, (0, position, position))
                self._met[event_type] = (events + 1, min(first, position), max(last, position))

    @property
    def has_news(self) -> bool:
        """Whether a type was met that this leadership has not written down yet. It should: a crash would lose it."""
        return not self._met.keys() <= self._written

    def write(self, connection: "Connection") -> None:
        """Write what was counted since the last time."""
        if self._met:
            events, first, last = zip(*self._met.values(), strict=True)
            connection.execute(_NOTE, (list(self._met), list(events), list(first), list(last)))
            if self.has_news:
                connection.execute(_FORGET_OLDEST, (MAX_TYPES,))
                if len(self._written) > MAX_TYPES:
                    self._written.clear()
            self._written |= self._met.keys()
            self._met.clear()
