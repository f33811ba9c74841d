"""Which deliveries the relay sends, and when: the relay's side of the table `deliveries`, on its own connection.

A delivery that is due is leased and then sent. A lease that is not ended expires: the message was lost
with Redis, or the relay that leased it ended before it was sent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow, class_row

from dovecote.route import Route
from dovecote.store.envelopes import past_unreadable
from dovecote.store.unsendable import dead_letter_gone

#: Most bytes of envelopes that one lease returns, unless it is a single event.
MAX_LEASE_BYTES = 8_000_000
# A message that was lost unnoticed is sent again after twice the time since it was sent first, and after this at the
# latest.
_MAX_LEASE_SECONDS = 3_600.0
#: Redis and the worker hold a whole message in memory; large payloads make smaller bundles.
MAX_BUNDLE_BYTES = 1_000_000


@dataclass(frozen=True)
class DueDelivery:
    """A retry whose time has come, leased to the caller.

    `changed_at` is Unix microseconds: when it failed last, or was released. A lease does not change it.
    `first_leased_at`, the same, is when this attempt was leased first; what was leased together then goes in the
    messages it went in then, however often it is sent again.
    `envelope` of one that is large is the event's id in 16 bytes: it is to be fetched (dovecote/store/envelopes.py).
    """

    handler_name: str
    event_id: UUID
    position: int
    aggregate_type: str
    aggregate_id: str
    changed_at: int
    first_leased_at: int
    replay_id: UUID | None
    envelope: bytes


# An event that was released brings those along that wait behind it, as many as make a bundle: each of them is written
# once on its way. One that has failed goes alone (see sql/0006_order.up.sql). Nothing was heard of one whose
# lease is over, so its message may be lost; mostly it is still queued, because its queue has no consumers. It is leased
# for as long as nothing has been heard of it, or a queue without consumers would be written about for ever.
_LEASE_DUE = """
    with due as materialized (
        select handler_name, event_id,
               coalesce(case when next_attempt_at = leased_until and first_leased_at between 'epoch' and now()
                             then first_leased_at end, now()) as first_leased_at
        from dovecote.due_retries(%(handlers)s::text[], %(bundle_sizes)s::integer[], %(limit)s, %(max_bytes)s,
                                  %(max_bundle_bytes)s)
    ), lease as (
        select handler_name, event_id, first_leased_at,
               now() + least(greatest(now() - first_leased_at, make_interval(secs => %(lease_seconds)s)),
                             make_interval(secs => %(longest_lease_seconds)s)) as until
        from due
    ), leased as (
        update dovecote.deliveries d
        set state = 'retrying', next_attempt_at = lease.until, leased_until = lease.until,
            first_leased_at = lease.first_leased_at,
            updated_at = case when d.state = 'waiting' then clock_timestamp() else d.updated_at end
        from lease where d.handler_name = lease.handler_name and d.event_id = lease.event_id
        returning d.handler_name, d.event_id, d.position, d.aggregate_type, d.aggregate_id,
                  (extract(epoch from least(greatest(d.updated_at, 'epoch'), '9999-01-01')) * 1000000)::bigint
                      as changed_at,
                  (extract(epoch from d.first_leased_at) * 1000000)::bigint as first_leased_at, d.replay_id
    )
    select leased.*, case when o.id is null then ''::bytea
                          when octet_length(small) <= %(max_small_bytes)s then convert_to(small, 'UTF8')
                          else uuid_send(leased.event_id) end as envelope
    from leased left join dovecote.outbox o on o.id = leased.event_id
    left join lateral (select dovecote.small_envelope(o) where o.id is not null offset 0) as made (small) on true
    order by leased.first_leased_at, leased.position
"""

# A retry that has failed since has another time than its lease: its backoff is left alone. One that a worker is at
# work on is locked for as long as its handler takes, and is left to it: the relay waits for no handler. It stays a
# lease, which is over: its message may be there still, and is to be the same.
_END_LEASES = """
    with leased as (
        select handler_name, event_id from dovecote.deliveries
        where state = 'retrying' and next_attempt_at = leased_until and next_attempt_at > now()
        for update skip locked
    )
    update dovecote.deliveries d set next_attempt_at = now(), leased_until = now()
    from leased where d.handler_name = leased.handler_name and d.event_id = leased.event_id
"""

_WITH_WAITING = """
    select handler from unnest(%s::text[]) as ordered (handler)
    where exists (select from dovecote.deliveries d where d.state = 'waiting' and d.handler_name = ordered.handler)
"""

# From one aggregate to the next by the index, however many events wait in each. The live ones are behind those of
# replays, which have been done before: if the last is of a replay, no live one waits there.
_RELEASE_UNBLOCKED = """
    with recursive slice as (
        (select d.aggregate_type, d.aggregate_id, d.event_id, d.replay_id, 1 as n from dovecote.deliveries d
         where d.state = 'waiting' and d.handler_name = %(handler)s
           and (d.aggregate_type, d.aggregate_id) > (%(after_type)s, %(after_id)s)
         order by d.aggregate_type, d.aggregate_id, d.position limit 1)
        union all
        select next.*, n + 1 from slice cross join lateral (
            select d.aggregate_type, d.aggregate_id, d.event_id, d.replay_id from dovecote.deliveries d
            where d.state = 'waiting' and d.handler_name = %(handler)s
              and (d.aggregate_type, d.aggregate_id) > (slice.aggregate_type, slice.aggregate_id)
            order by d.aggregate_type, d.aggregate_id, d.position limit 1) as next
        where n < %(aggregates)s
    ), first as (
        select n, aggregate_type, aggregate_id, case
            when replay_id is null then event_id
            when (select d.replay_id is null from dovecote.deliveries d
                  where d.state = 'waiting' and d.handler_name = %(handler)s
                    and d.aggregate_type = slice.aggregate_type and d.aggregate_id = slice.aggregate_id
                  order by d.position desc limit 1)
            then (select d.event_id from dovecote.deliveries d
                  where d.state = 'waiting' and d.handler_name = %(handler)s and d.replay_id is null
                    and d.aggregate_type = slice.aggregate_type and d.aggregate_id = slice.aggregate_id
                  order by d.position limit 1)
        end as event_id from slice
    )
    select dovecote.release(%(handler)s, %(event_types)s, coalesce(array_agg(event_id), '{}')),
           count(*), (array_agg(aggregate_type order by n desc))[1], (array_agg(aggregate_id order by n desc))[1]
    from first
"""

# The same for those of replays: what waits with nothing of its replay before it.
_RELEASE_UNBLOCKED_OF_REPLAYS = """
    with recursive slice as (
        (select d.replay_id, d.aggregate_type, d.aggregate_id, 1 as n from dovecote.deliveries d
         where d.replay_id is not null
           and (d.replay_id, d.aggregate_type, d.aggregate_id) > (%(after_replay)s, %(after_type)s, %(after_id)s)
         order by d.replay_id, d.aggregate_type, d.aggregate_id limit 1)
        union all
        select next.*, n + 1 from slice cross join lateral (
            select d.replay_id, d.aggregate_type, d.aggregate_id from dovecote.deliveries d
            where d.replay_id is not null
              and (d.replay_id, d.aggregate_type, d.aggregate_id)
                  > (slice.replay_id, slice.aggregate_type, slice.aggregate_id)
            order by d.replay_id, d.aggregate_type, d.aggregate_id limit 1) as next
        where n < %(aggregates)s
    ), first as (
        select slice.*, one.event_id from slice left join lateral (
            select d.event_id, d.state from dovecote.deliveries d
            where d.replay_id = slice.replay_id and d.handler_name = %(handler)s and d.state <> 'discarded'
              and d.aggregate_type = slice.aggregate_type and d.aggregate_id = slice.aggregate_id
            order by d.position limit 1) as one on one.state = 'waiting'
    )
    select dovecote.release(%(handler)s, %(event_types)s, coalesce(array_agg(event_id), '{}')),
           count(*), (array_agg(replay_id order by n desc))[1], (array_agg(aggregate_type order by n desc))[1],
           (array_agg(aggregate_id order by n desc))[1]
    from first
"""

# Some 2 ms, in which live events wait.
_AGGREGATES_A_LOOK = 10
_BEFORE_ALL = UUID(int=0)


@dataclass
class Cursor:
    """The aggregates of one handler that were looked at last; the next look goes on behind them."""

    aggregate: tuple[Any, ...] = ("", "")
    of_replay: tuple[Any, ...] = (_BEFORE_ALL, "", "")


def lease_due(
    connection: psycopg.Connection[TupleRow],
    limit: int,
    lease_seconds: float,
    routes: Sequence[Route] = (),
    max_small_bytes: int = 4_000,
) -> list[DueDelivery]:
    """Return retries of the routes' handlers whose time has come, at most so many; there may be more.

    Those leased together first come together, each group in writing order. Each is due again after the lease, should
    its message get lost with Redis. Of an ordered route an event that was released brings along what waits behind it.
    One whose event is not in the outbox is dead from now on, with the reason.
    """
    parameters = {
        "handlers": [route.handler for route in routes],
        "bundle_sizes": [route.bundle_size if route.ordered else 1 for route in routes],
        "limit": limit,
        "max_bytes": MAX_LEASE_BYTES,
        "max_bundle_bytes": MAX_BUNDLE_BYTES,
        "lease_seconds": lease_seconds,
        "longest_lease_seconds": max(lease_seconds, _MAX_LEASE_SECONDS),
        "max_small_bytes": max_small_bytes,
    }
    with connection.cursor(row_factory=class_row(DueDelivery), binary=True) as cursor:
        leased = past_unreadable(connection, _LEASE_DUE, lambda query: cursor.execute(query, parameters).fetchall())
    there = [one for one in leased if one.envelope]
    if len(there) < len(leased):
        dead_letter_gone(connection, routes, [(one.handler_name, one.event_id) for one in leased if not one.envelope])
    return there


def end_leases(connection: psycopg.Connection[TupleRow]) -> int:
    """Make every retry that was sent due at once, because its message may be lost; return how many."""
    return connection.execute(_END_LEASES).rowcount


def with_waiting(connection: psycopg.Connection[TupleRow], routes: Sequence[Route]) -> list[Route]:
    """Return those of the ordered routes for which an event waits: most of the time none, for one cheap question."""
    ordered = {route.handler: route for route in routes if route.ordered}
    return [ordered[handler] for (handler,) in connection.execute(_WITH_WAITING, (list(ordered),))]


def release_unblocked(connection: psycopg.Connection[TupleRow], route: Route, cursor: Cursor | None = None) -> int:
    """Send on events of an ordered route that wait for nothing any more; return how many.

    Looks at some aggregates behind the `cursor` and moves it, back to the beginning after the last. This is the net
    below `dovecote.release_next` and `release_parked`: for changes by hand, and for consumers older than these.
    """
    cursor = cursor or Cursor()
    names = {"handler": route.handler, "event_types": route.event_types, "aggregates": _AGGREGATES_A_LOOK}
    after = dict(zip(("after_type", "after_id"), cursor.aggregate, strict=True))
    released, last = _look(connection, _RELEASE_UNBLOCKED, {**names, **after})
    cursor.aggregate = last or Cursor.aggregate
    after = dict(zip(("after_replay", "after_type", "after_id"), cursor.of_replay, strict=True))
    of_replays, last = _look(connection, _RELEASE_UNBLOCKED_OF_REPLAYS, {**names, **after})
    cursor.of_replay = last or Cursor.of_replay
    return released + of_replays


def _look(
    connection: psycopg.Connection[TupleRow], query: str, parameters: Mapping[str, object]
) -> tuple[int, tuple[Any, ...] | None]:
    """Return how many events go on, and the last aggregate that was looked at, None at the end."""
    row = connection.execute(query, parameters).fetchone()
    assert row is not None, "an aggregate query returns a row"
    released, looked_at, *last = row
    return released, tuple(last) if looked_at == parameters["aggregates"] else None
