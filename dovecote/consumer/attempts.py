"""What an attempt that failed leaves behind: a row in `deliveries`, and a pause before the next one, or its end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.orm import Session

from dovecote.envelope import Envelope
from dovecote.errors import DomainError, GatewayUnavailable, UnknownEvent
from dovecote.route import Route
from dovecote.store.delivery_state import DeliveryState
from dovecote.telemetry.failures import Failure, KilledTheProcess, UnknownHandler, is_transient
from dovecote.telemetry.traces import trace_id

_record_failure = text(
    """
    insert into dovecote.deliveries as known (handler_name, event_id, position, aggregate_type, aggregate_id,
        event_type, state, attempts, next_attempt_at, error_type, error_fingerprint, error, trace_id, replay_id)
    values (:handler_name, :event_id, :position, :aggregate_type, :aggregate_id, :event_type, :state,
            :attempts, clock_timestamp() + make_interval(secs => cast(:pause_seconds as float8)),
            :error_type, :error_fingerprint, :error, :trace_id, :replay_id)
    on conflict (handler_name, event_id) do update set
        state = excluded.state, attempts = excluded.attempts, next_attempt_at = excluded.next_attempt_at,
        error_type = excluded.error_type, error_fingerprint = excluded.error_fingerprint,
        error = excluded.error, trace_id = excluded.trace_id, replay_id = excluded.replay_id,
        updated_at = clock_timestamp()
        where known.state <> 'discarded'
    """
)

_attempts_so_far = text(
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
class Attempt:
    """One attempt that failed with this error, described by `failure`."""

    envelope: Envelope
    error: BaseException
    failure: Failure


def attempts_so_far(session: Session, route: Route, envelopes: Sequence[Envelope]) -> dict[UUID, SoFar]:
    """Return how each of the events has failed until now, locked."""
    event_ids = [envelope.event_id for envelope in envelopes]
    found = session.execute(_attempts_so_far, {"handler_name": route.handler, "event_ids": event_ids})
    known = {row.event_id: SoFar(row.attempts, row.age) for row in found}
    return {envelope.event_id: known.get(envelope.event_id, SoFar()) for envelope in envelopes}


def record_failures(
    session: Session,
    route: Route,
    failed: Sequence[Attempt],
    so_far: Mapping[UUID, SoFar],
    replay: UUID | None = None,
) -> list[str]:
    """Write down failed attempts; return the state of each event: retrying or dead.

    With the same `so_far` they are written once, however often. What failed in a replay is tried again for that replay.
    """
    rows = [_row(route, attempt, so_far[attempt.envelope.event_id], replay) for attempt in failed]
    if rows:
        session.execute(_record_failure, rows)
    return [str(row["state"]) for row in rows]


def _row(route: Route, attempt: Attempt, so_far: SoFar, replay: UUID | None) -> dict[str, object]:
    envelope, error, failure = attempt.envelope, attempt.error, attempt.failure
    if isinstance(error, GatewayUnavailable | UnknownEvent | UnknownHandler) or is_transient(error):
        # The event is well, the provider is not; or this is not the code for it, which will come. No attempt is
        # spent, however long it takes.
        attempts = so_far.attempts
        final, pause = False, route.outage_pause(so_far.age)
    else:
        attempts = so_far.attempts + 1
        final, pause = attempts >= route.max_attempts or _is_final(route, error), route.backoff(attempts)
    return {
        "handler_name": route.handler,
        "event_id": envelope.event_id,
        "position": envelope.position,
        "aggregate_type": envelope.aggregate_type,
        "aggregate_id": envelope.aggregate_id,
        "event_type": envelope.type,
        "state": DeliveryState.DEAD if final else DeliveryState.RETRYING,
        "attempts": attempts,
        # The database's clock decides when, not the worker's.
        "pause_seconds": None if final else pause.total_seconds(),
        "error_type": failure.type,
        "error_fingerprint": failure.fingerprint,
        "error": failure.text,
        "trace_id": trace_id(envelope.traceparent),
        "replay_id": replay,
    }


def _is_final(route: Route, error: BaseException) -> bool:
    if isinstance(error, KilledTheProcess):
        return True
    return isinstance(error, DomainError) and not isinstance(error, route.transient_errors)
