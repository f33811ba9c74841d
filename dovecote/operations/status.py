"""How far the relay is and how each handler stands, in the same time however long the history is.

Nothing here counts a table. A count looks at a bounded number of rows, newest first, and `at_least` names the
counts that may be larger than they say; `count_everything` is exact and takes as long as the history is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import Connection, Engine, text

from dovecote.operations.handlers import Pause, paused
from dovecote.operations.snapshot import snapshot
from dovecote.operations.unprocessed import unprocessed
from dovecote.route import Route
from dovecote.store.delivery_state import DeliveryState
from dovecote.store.foreign_locks import QUERY, ForeignLock, foreign_locks
from dovecote.store.unrouted import UnroutedType, list_unrouted

# Rows looked at. They set what `status` costs: some 100 ms all together with ten million events on a busy machine.
_MAX_UNPUBLISHED = 20_000
_MAX_BATCHES = 5_000
_MAX_PROCESSED = 50_000
_MAX_DELIVERIES = 10_000
# Of each week of processed_events, some hundred rows each.
_NEWEST_PAGES = 32

_RATE_SECONDS = 60


@dataclass(frozen=True)
class RelayStatus:
    """What the relay has before it.

    fault        why no relay may lead: positions are not handed out in order; None while they are
    lag_events   committed and not yet published
    lag_seconds  age of the oldest of them; 0 when there is none
    leading      not while the relay stands back
    history      the one that Redis belongs to; None before the first handshake
    instance     the run of Postgres of that history
    stands_back_for  run of the newer Postgres whose relay uses our Redis; None for none
    published    events published so far
    published_per_second  over the last minute
    at_least     which of these numbers may be larger: more was there than is looked at
    foreign_locks  who holds advisory locks of ours and has no use for them
    """

    lag_events: int
    lag_seconds: float
    leading: bool
    owner: str | None
    epoch: int
    history: str | None
    instance: str | None
    stands_back_for: str | None
    checkpoint: int
    published: int
    published_per_second: float
    at_least: list[str]
    fault: str | None = None
    foreign_locks: list[ForeignLock] = field(default_factory=list)


@dataclass(frozen=True)
class HandlerStatus:
    """How a handler stands.

    unprocessed            written, neither acted on nor dead nor discarded; retrying and waiting ones included
    oldest_unprocessed_seconds  age of the oldest of them; 0 for none
    processed_per_second   over the last minute
    at_least               which of these numbers may be larger: more was there than is looked at
    """

    processed: int
    unprocessed: int
    retrying: int
    waiting: int
    dead: int
    discarded: int
    oldest_unprocessed_seconds: float
    processed_per_second: float
    paused: Pause | None
    at_least: list[str]


@dataclass(frozen=True)
class Status:
    relay: RelayStatus
    handlers: dict[str, HandlerStatus]
    unrouted: list[UnroutedType] = field(default_factory=list)


_POSITIONS = text(
    """
    select s.checkpoint, h.last_position, s.owner, s.epoch, s.history, s.instance, leader.is_there,
           dovecote.sequence_fault() as fault,
           case when leader.is_there then s.stands_back_for end as stands_back_for
    from dovecote.relay_state s, dovecote.low_watermark() h,
         (select exists (select from dovecote.leader()) as is_there) leader
    """
)

# What is not in any batch lies in the gaps between them. Looked at are both ends of what is above the checkpoint:
# a relay that is behind has its gap at the top, a writer that dawdles leaves one at the bottom.
_UNPUBLISHED = text(
    """
    with looked_at as (
        select int8multirange(
            int8range(:checkpoint, least(:last_position, :checkpoint + cast(:most as bigint)), '(]'),
            int8range(greatest(:checkpoint, :last_position - cast(:most as bigint)), :last_position, '(]')) as positions
    ), gaps as (
        select unnest(positions - coalesce(
            (select range_agg(b.positions) from dovecote.published_batches b where b.positions && looked_at.positions),
            '{}')) as gap
        from looked_at
    ), found as (
        select o.created_at
        from gaps cross join lateral (
            select created_at from dovecote.outbox
            where position >= lower(gap) and position < upper(gap) order by position limit :most) o
    )
    select count(*) as events,
           coalesce(greatest(0, extract(epoch from clock_timestamp() - min(created_at))), 0)::float as seconds
    from found
    """
)

# Written at positions that the relay has passed: the look above the checkpoint does not find them.
_NEVER_READ = text(
    """
    select count(*) as events,
           coalesce(greatest(0, extract(epoch from clock_timestamp() - min(created_at))), 0)::float as seconds
    from (select created_at from dovecote.never_read() limit :most) as never_read
    """
)

_PUBLISHED = text(
    """
    with newest as (
        select events, published_at from dovecote.published_batches order by published_at desc limit :most
    )
    select coalesce(sum(events), 0)::bigint as events, count(*) as batches,
           (coalesce(sum(events) filter (where published_at > clock_timestamp() - make_interval(secs => :seconds)), 0)
             / greatest(0.001, case
                 when min(published_at) > clock_timestamp() - make_interval(secs => :seconds) and count(*) = :most
                 then extract(epoch from clock_timestamp() - min(published_at)) else :seconds end))::float as per_second
    from newest
    """
)

_PROCESSED = text(
    """
    with newest as (
        select handler_name from dovecote.processed_events order by event_id desc, handler_name desc limit :most
    )
    select handler_name, count(*) as processed, sum(count(*)) over () = :most as is_bounded
    from newest group by handler_name
    """
)

_RATES = text(
    """
    select handler_name, sum(events_per_second) as rate from dovecote.processed_lately(:seconds, :pages)
    group by handler_name
    """
)

_DELIVERIES = text(
    """
    select h.name as handler_name, s.name as state, (
               select count(*) from (select from dovecote.deliveries d
                                     where d.handler_name = h.name and d.state = s.name limit :most) few) as events,
           (select event_id from dovecote.deliveries d
            where d.handler_name = h.name and d.state = s.name order by d.position limit 1) as oldest
    from unnest(cast(:handlers as text[])) as h (name)
    cross join unnest(cast(:states as text[])) as s (name)
    """
)

_AGE = text(
    """
    select coalesce(greatest(0, extract(epoch from clock_timestamp() - least(
        cast(:unprocessed as timestamptz),
        dovecote.uuid_v7_time(:retrying), dovecote.uuid_v7_time(:waiting)))), 0)::float
    """
)


def get_status(engine: Engine, routes: Sequence[Route]) -> Status:
    """Return how far relay and handlers are, from one snapshot."""
    with snapshot(engine) as connection:
        return Status(
            relay=_relay(connection), handlers=_handlers(connection, routes), unrouted=list_unrouted(connection)
        )


def _relay(connection: Connection) -> RelayStatus:
    positions = connection.execute(_POSITIONS).one()
    lag = connection.execute(
        _UNPUBLISHED,
        {
            "checkpoint": positions.checkpoint,
            "last_position": max(positions.last_position, positions.checkpoint),
            "most": _MAX_UNPUBLISHED,
        },
    ).one()
    lag_events, lag_seconds = lag.events, lag.seconds
    if positions.fault is not None:
        unread = connection.execute(_NEVER_READ, {"most": _MAX_UNPUBLISHED}).one()
        lag_events, lag_seconds = lag_events + unread.events, max(lag_seconds, unread.seconds)
    published = connection.execute(_PUBLISHED, {"most": _MAX_BATCHES, "seconds": _RATE_SECONDS}).one()
    bounds = {
        "lag_events": positions.fault is not None
        or positions.last_position - positions.checkpoint > 2 * _MAX_UNPUBLISHED,
        "published": published.batches == _MAX_BATCHES,
    }
    return RelayStatus(
        lag_events=lag_events,
        lag_seconds=lag_seconds,
        leading=positions.is_there and positions.stands_back_for is None,
        owner=positions.owner,
        epoch=positions.epoch,
        history=positions.history,
        instance=positions.instance,
        stands_back_for=positions.stands_back_for,
        checkpoint=positions.checkpoint,
        published=published.events,
        published_per_second=round(published.per_second, 2),
        at_least=[name for name, is_bounded in bounds.items() if is_bounded],
        fault=positions.fault,
        foreign_locks=foreign_locks(connection.exec_driver_sql(QUERY)),
    )


def _handlers(connection: Connection, routes: Sequence[Route]) -> dict[str, HandlerStatus]:
    handlers = [route.handler for route in routes]
    processed = {row.handler_name: row for row in connection.execute(_PROCESSED, {"most": _MAX_PROCESSED})}
    rates = {
        row.handler_name: row.rate
        for row in connection.execute(_RATES, {"seconds": _RATE_SECONDS, "pages": _NEWEST_PAGES})
    }
    deliveries = {
        (row.handler_name, row.state): row
        for row in connection.execute(
            _DELIVERIES, {"handlers": handlers, "states": list(DeliveryState), "most": _MAX_DELIVERIES}
        )
    }
    open_by_handler = unprocessed(connection, routes)
    pauses = paused(connection)
    found = {}
    for handler in handlers:
        states = {state: deliveries[handler, state] for state in DeliveryState}
        counts = {state: row.events for state, row in states.items()}
        at_least: list[str] = [state for state, count in counts.items() if count == _MAX_DELIVERIES]
        done, open_ = processed.get(handler), open_by_handler[handler]
        if any(row.is_bounded for row in processed.values()):
            at_least.append("processed")
        if open_.at_least or not {DeliveryState.RETRYING, DeliveryState.WAITING}.isdisjoint(at_least):
            at_least.append("unprocessed")
        found[handler] = HandlerStatus(
            processed=done.processed if done else 0,
            unprocessed=open_.events + counts[DeliveryState.RETRYING] + counts[DeliveryState.WAITING],
            oldest_unprocessed_seconds=connection.execute(
                _AGE,
                {
                    "unprocessed": open_.oldest,
                    "retrying": states[DeliveryState.RETRYING].oldest,
                    "waiting": states[DeliveryState.WAITING].oldest,
                },
            ).scalar_one(),
            processed_per_second=round(rates.get(handler, 0.0), 2),
            paused=pauses.get(handler),
            at_least=at_least,
            **counts,
        )
    return found
