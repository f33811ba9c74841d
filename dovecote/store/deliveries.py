"""What failed, what waits, what is dead: the consumer's side of the table `deliveries`.

An event that went well never appears here. A row is made by the consumer in a transaction of its own
(consumer/attempts.py), after the effect was rolled back, and goes away with the effect that finally commits. What is
due is leased and sent by the relay (store/leases.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from dovecote.envelope import Envelope
from dovecote.route import Route
from dovecote.store.bundle import Bundle
from dovecote.store.connections import driver_connection
from dovecote.store.lookup import LOOKED_UP, REST, Found, found_in, parameters
from dovecote.store.pauses import require_at_work
from dovecote.unit_of_work import UnitOfWork

# A paused handler has nothing to do, so these keep nothing (dovecote/store/pauses.py).
_STILL_DUE = f"""{LOOKED_UP}, due as materialized (
        select event_id from dovecote.deliveries
        where handler_name = %(handler_name)s and event_id = any(%(event_ids)s::uuid[]) and state = 'retrying'
          and replay_id is not distinct from %(replay_id)s::uuid
          and not exists (select from dovecote.paused_handlers where handler_name = %(handler_name)s)
        for update
    ), kept as (
        select event_id from due where event_id not in (select event_id from absent)
    ) {REST}"""  # noqa: S608 - put together from constants

_NOT_YET_FAILED = f"""{LOOKED_UP}, kept as (
        select event_id from bundle
        where event_id not in (select d.event_id from dovecote.deliveries d
                               where d.handler_name = %(handler_name)s and d.event_id = any(%(event_ids)s::uuid[]))
          and not exists (select from dovecote.paused_handlers where handler_name = %(handler_name)s)
          and event_id not in (select event_id from absent)
    ) {REST}"""  # noqa: S608 - put together from constants

_is_settled = text(
    """
    select exists (select from dovecote.processed_events where event_id = :event_id and handler_name = :handler_name)
        or exists (select from dovecote.deliveries where event_id = :event_id and handler_name = :handler_name)
    """
)

_processed = text(
    "select event_id from dovecote.processed_events where event_id = any(:event_ids) and handler_name = :handler_name"
)

# Waits for its end, a few seconds at most.
_end_backend = text("select pg_terminate_backend(:pid, 5000)")

# What _NOT_YET_FAILED and `UnitOfWork.once` do, in one statement: they are most of what a lone event waits for.
_ONCE_UNLESS_FAILED = f"""{LOOKED_UP}, kept as (
        insert into dovecote.processed_events (event_id, handler_name)
        select event_id, %(handler_name)s from bundle
        where not exists (select from dovecote.deliveries d
                          where d.handler_name = %(handler_name)s and d.event_id = bundle.event_id)
          and not exists (select from dovecote.paused_handlers where handler_name = %(handler_name)s)
          and event_id not in (select event_id from absent)
        order by event_id
        on conflict do nothing
        returning event_id
    ) {REST}"""  # noqa: S608 - put together from constants

_resolve = text("delete from dovecote.deliveries where handler_name = :handler_name and event_id = any(:event_ids)")

_blockers = text(
    """
    select event_id, blocker,
           (select d.event_id from dovecote.deliveries d
            where d.handler_name = :handler_name and d.event_id = blocker) is not null as is_kept
    from dovecote.blockers(:handler_name, cast(:event_types as text[]), cast(:event_ids as uuid[]),
                           cast(:aggregate_types as text[]), cast(:aggregate_ids as text[]),
                           cast(:positions as bigint[])) as found
    """
)

# In a replay every event before this one is done or has a row: waves follow each other, and the events of one
# aggregate in a wave are one bundle (dovecote/relay/replayer.py).
_blockers_in_replay = text(
    """
    select event_id, true as is_kept,
           (select d.event_id from dovecote.deliveries d
            where d.replay_id = :replay_id and d.handler_name = :handler_name
              and d.aggregate_type = bundle.aggregate_type and d.aggregate_id = bundle.aggregate_id
              and d.position < bundle.position and d.state <> 'discarded'
            order by d.position desc limit 1) as blocker
    from unnest(cast(:event_ids as uuid[]), cast(:aggregate_types as text[]), cast(:aggregate_ids as text[]),
                cast(:positions as bigint[])) as bundle (event_id, aggregate_type, aggregate_id, position)
    """
)

_park = text(
    """
    insert into dovecote.deliveries as known
        (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state, replay_id)
    select :handler_name, *, 'waiting', cast(:replay_id as uuid)
    from unnest(cast(:event_ids as uuid[]), cast(:positions as bigint[]), cast(:aggregate_types as text[]),
                cast(:aggregate_ids as text[]), cast(:event_types as text[]))
    on conflict (handler_name, event_id) do update
        set state = 'waiting', next_attempt_at = null, updated_at = clock_timestamp()
        where known.state = 'retrying'
    """
)

_release_next = text(
    """
    select dovecote.wake('dovecote_deliveries')
    from dovecote.release_next(:handler_name, cast(:event_types as text[]), cast(:aggregate_types as text[]),
                               cast(:aggregate_ids as text[]), cast(:positions as bigint[]),
                               cast(:replay_id as uuid)) as released
    where released > 0
    """
)

_release_parked = text(
    """
    select dovecote.wake('dovecote_deliveries')
    from dovecote.release_parked(:handler_name, cast(:event_types as text[]), cast(:event_ids as uuid[])) as released
    where released > 0
    """
)


def once_unless_failed(session: Session, bundle: Bundle) -> Found:
    """Record that the handler acts on these now; leave out what it has acted on, or failed at, before."""
    return _find(session, _ONCE_UNLESS_FAILED, bundle)


def to_do(session: Session, bundle: Bundle) -> Found:
    """Leave out what another message or an operator has to do with by now.

    Of a retry that is what is not `retrying` any more. The others are locked: nobody else tries, buries or discards
    them. Otherwise it is what has a delivery, and follows that one's schedule.
    Errors: HandlerPaused.
    """
    found = _find(session, _STILL_DUE if bundle.retry else _NOT_YET_FAILED, bundle)
    if not found.to_do:
        require_at_work(session, bundle.route.handler)
    return found


def still_open(session: Session, bundle: Bundle) -> Sequence[Envelope]:
    """Return what is neither done nor, by the same message, on record already.

    Errors: HandlerPaused.
    """
    open_ones = to_do(session, bundle).to_do
    if bundle.replay is None:
        processed = set(session.execute(_processed, _key(bundle.route, open_ones)).scalars())
        return [envelope for envelope in open_ones if envelope.event_id not in processed]
    # Taken back: it only asks whether the handler would still act.
    marks = session.begin_nested()
    would_act = UnitOfWork(session).again(bundle.route.handler, open_ones, bundle.replay, as_retry=bundle.retry)
    marks.rollback()
    return would_act


def _find(session: Session, query: str, bundle: Bundle) -> Found:
    names = {"handler_name": bundle.route.handler, "replay_id": bundle.replay}
    # On the driver: a lone event waits for this statement, and SQLAlchemy's part of it would be a quarter.
    return found_in(driver_connection(session).execute(query, {**parameters(bundle), **names}), bundle)


def resolve(session: Session, route: Route, envelopes: Sequence[Envelope]) -> None:
    """Forget deliveries whose effect commits with this transaction."""
    session.execute(_resolve, _key(route, envelopes))


def end_backend(session: Session, pid: int | None) -> None:
    """End another session of our own role, and with it what it has locked."""
    if pid is not None:
        session.execute(_end_backend, {"pid": pid})


@dataclass(frozen=True)
class Blocked:
    """Events that must wait for an earlier one, and an earlier one that no delivery tells of, if there is any.

    That one is in another worker's hands, or on its way there.
    """

    envelopes: list[Envelope]
    in_flight: UUID | None


def blocked(session: Session, route: Route, envelopes: Sequence[Envelope], replay: UUID | None = None) -> Blocked:
    """Return which of the events, given in writing order, must wait for an earlier one of their aggregate.

    In a replay they wait for what failed in that replay: each replay keeps the order of its own.
    """
    bundle = {
        **_key(route, envelopes),
        **_aggregates(envelopes),
        "positions": [envelope.position for envelope in envelopes],
    }
    if replay is None:
        found = session.execute(_blockers, {**bundle, "event_types": route.event_types})
    else:
        found = session.execute(_blockers_in_replay, {**bundle, "replay_id": replay})
    unresolved = {row.event_id: row for row in found if row.blocker}
    here = {envelope.event_id for envelope in envelopes}
    waiting: dict[UUID, Envelope] = {}
    in_flight: UUID | None = None
    for envelope in envelopes:
        before = unresolved.get(envelope.event_id)
        # An unresolved predecessor in this very bundle is done just before, unless it must wait itself.
        if before is not None and (before.blocker not in here or before.blocker in waiting):
            waiting[envelope.event_id] = envelope
            if before.blocker not in here and not before.is_kept:
                in_flight = before.blocker
    return Blocked(list(waiting.values()), in_flight)


def is_settled(session: Session, route: Route, event_id: UUID) -> bool:
    """Return whether the handler has acted on the event, or a delivery tells of it."""
    return bool(session.scalar(_is_settled, {"event_id": event_id, "handler_name": route.handler}))


def park(session: Session, route: Route, envelopes: Sequence[Envelope], replay: UUID | None = None) -> None:
    """Let events wait behind an earlier one of their aggregate."""
    session.execute(
        _park,
        {
            **_key(route, envelopes),
            **_aggregates(envelopes),
            "positions": [envelope.position for envelope in envelopes],
            "event_types": [envelope.type for envelope in envelopes],
            "replay_id": replay,
        },
    )


def release_next(session: Session, route: Route, done: Sequence[Envelope], replay: UUID | None = None) -> None:
    """Send on the first event that waits in each aggregate of these, given in writing order, which are done.

    The last statement of a transaction; the relay hears of it when that commits, and takes along what waits next.
    """
    last = {(envelope.aggregate_type, envelope.aggregate_id): envelope for envelope in done}
    session.execute(
        _release_next,
        {
            "handler_name": route.handler,
            "event_types": route.event_types,
            "replay_id": replay,
            **_aggregates(list(last.values())),
            "positions": [envelope.position for envelope in last.values()],
        },
    )


def release_parked(session: Session, route: Route, parked: Sequence[Envelope]) -> None:
    """Send on those of the events whose predecessor was done while they were being parked.

    In a transaction of its own after the one that parked them; it waits for commits of the handler, not for the
    handler.
    """
    # What is behind the first of an aggregate waits for that one.
    first: dict[tuple[str, str], Envelope] = {}
    for envelope in parked:
        first.setdefault((envelope.aggregate_type, envelope.aggregate_id), envelope)
    session.execute(_release_parked, {**_key(route, list(first.values())), "event_types": route.event_types})


def _key(route: Route, envelopes: Sequence[Envelope]) -> dict[str, object]:
    return {"handler_name": route.handler, "event_ids": [envelope.event_id for envelope in envelopes]}


def _aggregates(envelopes: Sequence[Envelope]) -> dict[str, object]:
    return {
        "aggregate_types": [envelope.aggregate_type for envelope in envelopes],
        "aggregate_ids": [envelope.aggregate_id for envelope in envelopes],
    }
