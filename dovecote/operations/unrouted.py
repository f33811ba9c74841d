"""Events without routes: kept in the outbox, told of here."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text


@dataclass(frozen=True)
class UnroutedType:
    """A type the relay met that no handler wants.

    events     how many, about: an event published twice counts twice
    wanted_by  handlers that want another version of the same fact: deploy code that knows this one, and they get it
    """

    event_type: str
    events: int
    first_position: int
    last_position: int
    first_seen_at: datetime
    last_seen_at: datetime
    wanted_by: list[str]


_UNROUTED = text(
    """
    select u.event_type, u.events, u.first_position, u.last_position, u.first_seen_at, u.last_seen_at,
           coalesce((select array_agg(distinct s.handler_name order by s.handler_name) from dovecote.subscriptions s
                     where dovecote.fact_of(s.event_type) = dovecote.fact_of(u.event_type)), '{}') as wanted_by
    from dovecote.unrouted_types u
    where not exists (select from dovecote.subscriptions s where s.event_type = u.event_type)
    order by u.last_seen_at desc, u.last_position desc limit :most
    """
)
# As many as the relay keeps; there may be more from a version that kept them all.
_MAX_TYPES = 1_000


def unrouted(connection: Connection) -> list[UnroutedType]:
    """Return the types that nobody subscribes to, the one met last first: at most 1,000."""
    return [UnroutedType(**row._mapping) for row in connection.execute(_UNROUTED, {"most": _MAX_TYPES})]
