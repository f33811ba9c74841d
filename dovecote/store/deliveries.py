"""Deliveries: what failed, what waits, what is dead. The consumer's side of the table `deliveries`.

An event whose handler succeeded at the first try never appears here. A row is made in a transaction of its own, after
the effect was rolled back, and is deleted with the effect that finally commits. The relay leases what is due and sends
it (store/leases.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from dovecote.envelope import Envelope
from dovecote.route import Route
from dovecote.store.bundle import Bundle
from dovecote.store.connections import driver_connection
from dovecote.store.delivery_state import DeliveryState
from dovecote.store.lookup import LOOKED_UP, REST, Found, found_in, parameters
from dovecote.store.pauses import require_not_paused
from dovecote.telemetry.failures import Failure
from dovecote.telemetry.traces import trace_id
from dovecote.unit_of_work import UnitOfWork

# While the handler is paused these find nothing to do (dovecote/store/pauses.py).
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

_IS_SETTLED = text(
    """
    select exists (select from dovecote.processed_events where event_id = :event_id and handler_name = :handler_name)
        or exists (select from dovecote.deliveries where event_id = :event_id and handler_name = :handler_name)
    """
)

_PROCESSED = text(
    "select event_id from dovecote.processed_events where event_id = any(:event_ids) and handler_name = :handler_name"
)

# _NOT_YET_FAILED and `UnitOfWork.once` in one statement: they are most of the latency of a single event.
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

_RESOLVE = text("delete from dovecote.deliveries where handler_name = :handler_name and event_id = any(:event_ids)")

_BLOCKERS = text(
    """
    select event_id, blocker,
           (select d.event_id from dovecote.deliveries d
            where d.handler_name = :handler_name and d.event_id = blocker) is not null as is_kept
    from dovecote.blockers(:handler_name, cast(:event_types as text[]), cast(:event_ids as uuid[]),
                           cast(:aggregate_types as text[]), cast(:aggregate_ids as text[]),
                           cast(:positions as bigint[])) as found
    """
)

# In a replay every event before this one is done or has a row: one wave follows another, and the events of an
# aggregate in a wave are one bundle (dovecote/relay/replayer.py).
_BLOCKERS_IN_REPLAY = text(
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

_PARK = text(
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

_RELEASE_NEXT = text(
    """
    select dovecote.wake('dovecote_deliveries')
    from dovecote.release_next(:handler_name, cast(:event_types as text[]), cast(:aggregate_types as text[]),
                               cast(:aggregate_ids as text[]), cast(:positions as bigint[]),
                               cast(:replay_id as uuid)) as released
    where released > 0
    """
)

_RELEASE_PARKED = text(
    """
    select dovecote.wake('dovecote_deliveries')
    from dovecote.release_parked(:handler_name, cast(:event_types as text[]), cast(:event_ids as uuid[])) as released
    where released > 0
    """
)

_RECORD_FAILURES = text(
    """
    insert into dovecote.deliveries as known (handler_name, event_id, position, aggregate_type, aggregate_id,
        event_type, state, attempts, next_attempt_at, error_type, headline, error_fingerprint, error, trace_id,
        replay_id)
    values (:handler_name, :event_id, :position, :aggregate_type, :aggregate_id, :event_type, :state,
            :attempts, clock_timestamp() + make_interval(secs => cast(:pause_seconds as float8)),
            :error_type, :headline, :error_fingerprint, :error, :trace_id, :replay_id)
    on conflict (handler_name, event_id) do update set
        state = excluded.state, attempts = excluded.attempts, next_attempt_at = excluded.next_attempt_at,
        error_type = excluded.error_type, headline = excluded.headline,
        error_fingerprint = excluded.error_fingerprint, error = excluded.error, trace_id = excluded.trace_id,
        replay_id = excluded.replay_id,
        updated_at = clock_timestamp()
        where known.state <> 'discarded'
    """
)

_FAILED_SO_FAR = text(
    """
    select event_id, attempts, clock_timestamp() - first_failed_at as age from dovecote.deliveries
    where handler_name = :handler_name and event_id = any(:event_ids)
    for update
    """
)


@dataclass(frozen=True)
class SoFar:
    """How often an event has failed, and for how long."""

    attempts: int = 0
    age: timedelta = timedelta()


@dataclass(frozen=True)
class FailedAttempt:
    """What a failed attempt leaves in `deliveries`; `pause` until the next one, None where there is none."""

    envelope: Envelope
    failure: Failure
    state: DeliveryState
    attempts: int
    pause: timedelta | None


@dataclass(frozen=True)
class Blocked:
    """The events that must wait for an earlier one of their aggregate.

    in_flight  an earlier event without a delivery, if there is one: another worker handles it, or is about to
    """

    envelopes: list[Envelope]
    in_flight: UUID | None


class Deliveries:
    """The deliveries of one handler, seen in one transaction; with `replay`, in that replay."""

    def __init__(self, session: Session, route: Route, replay: UUID | None = None) -> None:
        self._session = session
        self._route = route
        self._replay = replay

    # What there is to do ---------------------------------------------------------------------

    def once_unless_failed(self, bundle: Bundle) -> Found:
        """Record in processed_events the events that the handler has neither acted on nor failed at; return them."""
        return self._find(_ONCE_UNLESS_FAILED, bundle)

    def due(self, bundle: Bundle) -> Found:
        """Return the events that this message is to have handled.

        Of a retry: those still `retrying`, locked, so that nobody else handles or discards them meanwhile. Of any other
        message: those without a delivery; the rest follow the schedule of theirs.
        Errors: HandlerPaused.
        """
        found = self._find(_STILL_DUE if bundle.retry else _NOT_YET_FAILED, bundle)
        if not found.to_do:
            require_not_paused(self._session, self._route.handler)
        return found

    def still_open(self, bundle: Bundle) -> Sequence[Envelope]:
        """Return the events that are neither done nor recorded as failed, by the same message perhaps.

        Errors: HandlerPaused.
        """
        open_ones = self.due(bundle).to_do
        if self._replay is None:
            processed = set(self._session.execute(_PROCESSED, self._key(open_ones)).scalars())
            return [envelope for envelope in open_ones if envelope.event_id not in processed]
        # Rolled back: this asks only whether the handler would act once more.
        savepoint = self._session.begin_nested()
        would_act = UnitOfWork(self._session).again(self._route.handler, open_ones, self._replay, as_retry=bundle.retry)
        savepoint.rollback()
        return would_act

    def is_finished(self, event_id: UUID) -> bool:
        """Return whether the handler has acted on the event, or there is a delivery of it."""
        return bool(self._session.scalar(_IS_SETTLED, {"event_id": event_id, "handler_name": self._route.handler}))

    def _find(self, query: str, bundle: Bundle) -> Found:
        names = {"handler_name": self._route.handler, "replay_id": self._replay}
        # On the driver: a single event waits for this statement, and SQLAlchemy would make it a quarter slower.
        return found_in(driver_connection(self._session).execute(query, {**parameters(bundle), **names}), bundle)

    # What failed -----------------------------------------------------------------------------

    def failed_so_far(self, envelopes: Sequence[Envelope]) -> dict[UUID, SoFar]:
        """Return how each of the events has failed until now, and lock the rows."""
        known = {
            row.event_id: SoFar(row.attempts, row.age)
            for row in self._session.execute(_FAILED_SO_FAR, self._key(envelopes))
        }
        return {envelope.event_id: known.get(envelope.event_id, SoFar()) for envelope in envelopes}

    def record_failures(self, failed: Sequence[FailedAttempt]) -> None:
        """Write failed attempts; writing the same ones again changes nothing."""
        if failed:
            self._session.execute(_RECORD_FAILURES, [self._row(attempt) for attempt in failed])

    def resolve(self, envelopes: Sequence[Envelope]) -> None:
        """Delete deliveries whose effect commits with this transaction."""
        self._session.execute(_RESOLVE, self._key(envelopes))

    def _row(self, attempt: FailedAttempt) -> Mapping[str, object]:
        envelope, failure = attempt.envelope, attempt.failure
        return {
            "handler_name": self._route.handler,
            "event_id": envelope.event_id,
            "position": envelope.position,
            "aggregate_type": envelope.aggregate_type,
            "aggregate_id": envelope.aggregate_id,
            "event_type": envelope.type,
            "state": attempt.state,
            "attempts": attempt.attempts,
            # The time of the next attempt is by the database's clock, not the worker's.
            "pause_seconds": attempt.pause.total_seconds() if attempt.pause is not None else None,
            "error_type": failure.type,
            "headline": failure.headline,
            "error_fingerprint": failure.fingerprint,
            "error": failure.text,
            "trace_id": trace_id(envelope.traceparent),
            # What failed in a replay is tried again for that replay.
            "replay_id": self._replay,
        }

    # What waits ------------------------------------------------------------------------------

    def blocked(self, envelopes: Sequence[Envelope]) -> Blocked:
        """Return which of the events, given in writing order, must wait for an earlier one of their aggregate.

        In a replay they wait for what failed in that replay: each replay keeps an order of its own.
        """
        bundle = {**self._key(envelopes), **_aggregates(envelopes), "positions": _positions(envelopes)}
        if self._replay is None:
            found = self._session.execute(_BLOCKERS, {**bundle, "event_types": self._route.event_types})
        else:
            found = self._session.execute(_BLOCKERS_IN_REPLAY, {**bundle, "replay_id": self._replay})
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

    def park(self, envelopes: Sequence[Envelope]) -> None:
        """Make events wait behind an earlier one of their aggregate."""
        self._session.execute(
            _PARK,
            {
                **self._key(envelopes),
                **_aggregates(envelopes),
                "positions": _positions(envelopes),
                "event_types": [envelope.type for envelope in envelopes],
                "replay_id": self._replay,
            },
        )

    def release_next(self, done: Sequence[Envelope]) -> None:
        """Release the first event that waits in each aggregate of these, given in writing order, which are done.

        The last statement of a transaction. The relay is notified when that commits, and sends what waits next along.
        """
        last = list({(envelope.aggregate_type, envelope.aggregate_id): envelope for envelope in done}.values())
        self._session.execute(
            _RELEASE_NEXT,
            {
                "handler_name": self._route.handler,
                "event_types": self._route.event_types,
                "replay_id": self._replay,
                **_aggregates(last),
                "positions": _positions(last),
            },
        )

    def release_parked(self, parked: Sequence[Envelope]) -> None:
        """Release those of the events whose predecessor was done while they were being parked.

        In a transaction of its own after the one that parked them. It waits for the handler's commits in progress, not
        for its calls.
        """
        # What is behind the first of an aggregate waits for that one.
        first: dict[tuple[str, str], Envelope] = {}
        for envelope in parked:
            first.setdefault((envelope.aggregate_type, envelope.aggregate_id), envelope)
        self._session.execute(
            _RELEASE_PARKED, {**self._key(list(first.values())), "event_types": self._route.event_types}
        )

    def _key(self, envelopes: Sequence[Envelope]) -> dict[str, object]:
        return {"handler_name": self._route.handler, "event_ids": [envelope.event_id for envelope in envelopes]}


def _aggregates(envelopes: Sequence[Envelope]) -> dict[str, object]:
    return {
        "aggregate_types": [envelope.aggregate_type for envelope in envelopes],
        "aggregate_ids": [envelope.aggregate_id for envelope in envelopes],
    }


def _positions(envelopes: Sequence[Envelope]) -> list[int]:
    return [envelope.position for envelope in envelopes]
