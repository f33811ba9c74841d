"""How far the relay is and how each handler stands."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, text

from workers.routes import Route


@dataclass(frozen=True)
class RelayStatus:
    """What the relay has before it.

    lag_events   committed and not yet published
    lag_seconds  age of the oldest of them; 0 when there is none
    """

    lag_events: int
    lag_seconds: float
    leading: bool
    owner: str | None
    epoch: int
    checkpoint: int
    published: int


@dataclass(frozen=True)
class HandlerStatus:
    """How a handler stands.

    unprocessed            published or about to be, neither acted on nor dead nor discarded
    oldest_unprocessed_seconds  age of the oldest of them, retrying and waiting ones included; 0 for none
    """

    processed: int
    unprocessed: int
    retrying: int
    waiting: int
    dead: int
    discarded: int
    oldest_unprocessed_seconds: float


@dataclass(frozen=True)
class Status:
    relay: RelayStatus
    handlers: dict[str, HandlerStatus]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_RELAY = text(
    """
    with unpublished as (
        select o.created_at from dovecote.outbox o, dovecote.relay_state s
        where o.position > s.checkpoint
          and not exists (select from dovecote.published_batches b where b.positions @> o.position)
    )
    select (select count(*) from unpublished) as lag_events,
           (select coalesce(greatest(0, extract(epoch from clock_timestamp() - min(created_at))), 0)
            from unpublished)::float as lag_seconds,
           exists (select from pg_locks
                   where locktype = 'advisory' and objsubid = 1 and granted
                     and (classid::bigint << 32 | objid::bigint) = dovecote.leader_key()
                     and database = (select oid from pg_database where datname = current_database())) as leading,
           s.owner, s.epoch, s.checkpoint,
           (select coalesce(sum(events), 0) from dovecote.published_batches)::bigint as published
    from dovecote.relay_state s
    """
)

_PROCESSED = text("select handler_name, count(*) as processed from dovecote.processed_events group by handler_name")

_DELIVERIES = text("select handler_name, state, count(*) from dovecote.deliveries group by handler_name, state")

_UNPROCESSED = text(
    """
    select count(*), coalesce(greatest(0, extract(epoch from clock_timestamp() - min(o.created_at))), 0)::float
    from dovecote.outbox o
    left join dovecote.subscriptions s on s.handler_name = :handler and s.event_type = o.event_type
    where o.event_type = any(:event_types) and o.position > coalesce(s.since_position, 0)
      and not exists (select from dovecote.processed_events p
                      where p.event_id = o.id and p.handler_name = :handler)
      and not exists (select from dovecote.deliveries d where d.event_id = o.id and d.handler_name = :handler
                      and d.state in ('dead', 'discarded'))
    """
)


def status(engine: Engine, routes: Sequence[Route]) -> Status:
    """Return how far relay and handlers are, from one snapshot."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        relay = connection.execute(_RELAY).one()
        processed: dict[str, int] = {row.handler_name: row.processed for row in connection.execute(_PROCESSED)}
        deliveries: dict[tuple[str, str], int] = {
            (handler, state): count for handler, state, count in connection.execute(_DELIVERIES)
        }
        return Status(
            relay=RelayStatus(**relay._mapping),
            handlers={route.handler: _handler_status(connection, route, processed, deliveries) for route in routes},
        )


def _handler_status(
    connection: Connection, route: Route, processed: dict[str, int], deliveries: dict[tuple[str, str], int]
) -> HandlerStatus:
    unprocessed, oldest_seconds = connection.execute(
        _UNPROCESSED, {"handler": route.handler, "event_types": route.event_types}
    ).one()
    states = {
        state: deliveries.get((route.handler, state), 0) for state in ("retrying", "waiting", "dead", "discarded")
    }
    return HandlerStatus(
        processed=processed.get(route.handler, 0),
        unprocessed=unprocessed,
        oldest_unprocessed_seconds=oldest_seconds,
        **states,
    )
