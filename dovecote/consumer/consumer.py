"""Acts on one bundle of events, each once.

In one transaction: record the events in `processed_events`, call the handler, commit (transaction.py). Only then is the
message acknowledged, so a crash anywhere repeats the bundle, and the record absorbs what was done. A bundle that fails
is rolled back and taken in parts (parts.py); events that fail alone are written to `deliveries` (attempts.py). Events
that cannot be read are written there at once, without a transaction of their handler's.

While Postgres is unavailable the message is held, and no attempt is spent (retrying.py). Nor is one when a server is
unavailable that only the handler uses: its event is tried again later and delays no other. Nor after a conflict with
another transaction, unless there is one time after time. A handler that takes too long is cut off (time_limits.py), and
the event that kills its process is found (dovecote/store/poison.py).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import structlog

from dovecote.consumer.attempts import Attempt
from dovecote.consumer.parts import Parts
from dovecote.consumer.retrying import Allowance, Retrying, Stopping
from dovecote.consumer.stuck import end_stuck_process
from dovecote.consumer.time_limits import TimeLimits
from dovecote.consumer.transaction import BundleTransaction, Outcome
from dovecote.database import Sessions
from dovecote.envelope import Contents, Envelope
from dovecote.envelope.message_reader import MessageReader, Received
from dovecote.envelope.signatures import MessageKeys
from dovecote.privacy import Keyring
from dovecote.route import Route
from dovecote.store import lookup
from dovecote.store.bundle import Bundle
from dovecote.store.deliveries import Deliveries, FailedAttempt, SoFar
from dovecote.store.pauses import HandlerPaused
from dovecote.store.poison import MAX_CRASHES, PoisonMessage, one_at_a_time
from dovecote.telemetry.context import event_in_flight, set_in_flight
from dovecote.telemetry.failures import KilledTheProcess, TimeLimitExceeded, UnknownHandler
from dovecote.telemetry.instrumentation import ConsumerInstrumentation
from dovecote.telemetry.traces import acting_on, consuming
from dovecote.unit_of_work import unit_of_work

log = structlog.get_logger()


@dataclass(frozen=True)
class HandlerFailure:
    """What a handler raised, and the event that it was called for then; None where it was the whole bundle."""

    error: BaseException
    blamed: Envelope | None


class Consumer:
    """Acts on bundles for one process; safe to use from many threads."""

    def __init__(
        self,
        sessions: Sessions,
        gateways: Any,
        stopping: threading.Event | None = None,
        outage_max_backoff_seconds: float = 1.0,
        await_schema: Callable[[], bool] | None = None,
        instrumentation: ConsumerInstrumentation | None = None,
        *,
        keyring: Keyring | None = None,
    ) -> None:
        self._sessions = sessions
        self._gateways = gateways
        self._stopping = stopping or threading.Event()
        self._retrying = Retrying(self._stopping, outage_max_backoff_seconds)
        self._retry = self._retrying.retry_while_unavailable
        self._await_schema = await_schema
        self.instrumentation = instrumentation or ConsumerInstrumentation()
        self._time_limits = TimeLimits(partial(end_stuck_process, sessions))
        self.keys = keyring
        self.message_keys = MessageKeys(sessions)
        self._message_reader = MessageReader(sessions, self.message_keys, keyring, self._retry)
        #: Returns the history of the messages in Redis, or None where it is not known.
        self.history_in_redis: Callable[[], str | None] = lambda: None

    def open(self, received: Received, route: Route | None) -> Contents:
        """Return what a relay has put into the message; nothing in it is trusted before.

        Errors: RefusedMessage, Stopping.
        """
        if (await_schema := self._await_schema) is not None:
            # Deployed before the schema it is written for: the message is held, as while Postgres is unavailable.
            if not await_schema():
                raise Stopping("the schema is older than this code")
            self._await_schema = None
        return self._message_reader.open(received, route.queue if route else None)

    def consume(self, bundle: Bundle) -> None:
        """Act on the events, or record in `deliveries` that they failed. Then their message can be acknowledged.

        What is not in the outbox is skipped.
        Errors: Stopping, HandlerPaused.
        """
        bundle = bundle.of(sorted(bundle.envelopes, key=lambda envelope: envelope.position))
        with consuming(bundle.route, bundle.envelopes):
            if bundle.poison is None:
                self._consume_in_parts(self._without_unreadable(bundle))
            else:
                self._consume_one_by_one(bundle, bundle.poison)

    def keep_for_other_code(self, bundle: Bundle) -> None:
        """Leave every event to its schedule: no route of this process has the handler.

        Errors: Stopping, HandlerPaused.
        """
        error = UnknownHandler("no route of this process has the handler: newer code, or older, will come and act")
        with consuming(bundle.route, bundle.envelopes):
            self._record(bundle, dict.fromkeys(_ids(bundle.envelopes), error), if_open=True)
            if bundle.poison is not None:
                self._retry(bundle.poison.clear)

    # Ways to take a bundle -------------------------------------------------------------------

    def _consume_in_parts(self, bundle: Bundle) -> None:
        """All at once; after a failure in parts, until each event that fails is alone."""
        parts = Parts(bundle.envelopes)
        while envelopes := parts.next():
            part = bundle.of(envelopes)
            failure = self._act(part)
            if failure is None:
                parts.succeeded()
            elif len(envelopes) > 1:
                parts.failed(failure.blamed, was_slow=isinstance(failure.error, TimeLimitExceeded))
            else:
                self._record(part, {envelopes[0].event_id: failure.error})
                parts.was_bad()

    def _consume_one_by_one(self, bundle: Bundle, poison: PoisonMessage) -> None:
        """Each event alone, and on record in Redis meanwhile: one of them may kill this process."""
        log.warning(
            "message was in flight in a process that died; its events are handled one by one",
            handler=bundle.route.handler,
            events=len(bundle.envelopes),
            crashes=poison.crashes,
        )
        for envelope in bundle.envelopes:
            alone = bundle.of([envelope])
            with one_at_a_time(self._retrying.require_not_stopping):
                crash_count = self._retry(partial(poison.crash_count, envelope.event_id))
                if crash_count >= MAX_CRASHES:
                    self._record(alone, {envelope.event_id: _killed(crash_count)}, if_open=True)
                    self._retry(poison.dead_lettered)
                elif (failure := self._act(alone)) is not None:
                    self._record(alone, {envelope.event_id: failure.error})
        self._retry(poison.clear)

    def _without_unreadable(self, bundle: Bundle) -> Bundle:
        """Record the events that cannot be read, all in one transaction; return the others."""
        errors: dict[UUID, BaseException] = {}
        for envelope in bundle.envelopes:
            try:
                _ = envelope.event
            except Exception as error:
                errors[envelope.event_id] = error
                with suppress(Exception), acting_on(bundle.route, envelope):
                    raise  # in a trace it is the handler's call that failed
        if not errors:
            return bundle
        self._record(bundle.of([one for one in bundle.envelopes if one.event_id in errors]), errors, if_open=True)
        return bundle.of([one for one in bundle.envelopes if one.event_id not in errors])

    # One attempt -----------------------------------------------------------------------------

    def _act(self, bundle: Bundle) -> HandlerFailure | None:
        """Act in one transaction, again while Postgres is unavailable; return what the handler raised, if anything."""
        set_in_flight(bundle.route, bundle.envelopes)
        outcome = self._retry(partial(self._try, bundle, Allowance(self._sessions)))
        if isinstance(outcome, HandlerFailure):
            return outcome
        self.instrumentation.acted(bundle.route.handler, outcome.acted, again=bundle.replay is not None)
        lookup.report(bundle.route, outcome.absent, self.instrumentation)
        if outcome.parked:
            self._retry(partial(self._release_parked, bundle.route, outcome.parked))
        return None

    def _try(self, bundle: Bundle, allowance: Allowance) -> Outcome | HandlerFailure:
        """Act in one transaction. What it raises is no failure of the handler, and has it done once more."""
        # Not raised while Postgres is waited for: if the process is killed then, it is not by this event.
        with self._crash_count_raised(bundle):
            try:
                with unit_of_work(self._sessions, keys=self.keys) as uow:
                    return BundleTransaction(
                        uow,
                        bundle,
                        gateways=self._gateways,
                        stopping=self._stopping,
                        time_limits=self._time_limits,
                        instrumentation=self.instrumentation,
                        history_in_redis=self.history_in_redis,
                    ).act()
            except (HandlerPaused, lookup.OtherHistory):
                raise
            except BaseException as error:  # sys.exit() in a handler, or a cancelled task, is its failure too
                if allowance.covers(error):
                    raise
                return HandlerFailure(error, event_in_flight())

    @contextmanager
    def _crash_count_raised(self, bundle: Bundle) -> Iterator[None]:
        """Until the end of the block, have Redis know which event is in flight. For poison messages only."""
        if bundle.poison is None:
            yield
            return
        (envelope,) = bundle.envelopes  # those of a poison message are handled one by one
        # Each step is retried: a Redis that is full or unavailable is no failure of the event.
        during, after = self._retry(partial(bundle.poison.in_flight, envelope.event_id))
        self._retry(partial(bundle.poison.write, during))
        try:
            yield
        finally:
            self._retry(partial(bundle.poison.write, after))

    def _release_parked(self, route: Route, parked: Sequence[Envelope]) -> None:
        with self._sessions() as session, session.begin():
            Deliveries(session, route).release_parked(parked)

    # Failures --------------------------------------------------------------------------------

    def _record(self, bundle: Bundle, errors: Mapping[UUID, BaseException], *, if_open: bool = False) -> None:
        """Write in one transaction that each event of the bundle has failed, with its error.

        Not of one that is not in the outbox: Postgres may have gone back since the handler was called.
        `if_open`: it was not tried just now, and may be done, or be on record already.
        Errors: HandlerPaused with `if_open`.
        """
        attempts = [Attempt.of(envelope, errors[envelope.event_id]) for envelope in bundle.envelopes]
        so_far: dict[UUID, SoFar] | None = None

        def write() -> tuple[list[FailedAttempt], Sequence[Envelope]]:
            nonlocal so_far
            with self._sessions() as session, session.begin():
                deliveries = Deliveries(session, bundle.route, bundle.replay)
                found = lookup.look_up(session, bundle)
                lookup.require_same_history(session, found, self.history_in_redis)
                if so_far is None:
                    # As it was at the first try: the reply to its commit may be what was lost.
                    those = deliveries.still_open(bundle.of(found.to_do)) if if_open else found.to_do
                    so_far = deliveries.failed_so_far(those)
                to_record = _ids(found.to_do) & so_far.keys()
                failed = [
                    attempt.after(so_far[attempt.envelope.event_id], bundle.route)
                    for attempt in attempts
                    if attempt.envelope.event_id in to_record
                ]
                deliveries.record_failures(failed)
                return failed, found.absent

        failed, absent = self._retry(write)
        lookup.report(bundle.route, absent, self.instrumentation)
        for attempt in failed:
            set_in_flight(bundle.route, (attempt.envelope,))
            self.instrumentation.failed(bundle.route.handler, attempt.state)
            log.warning(
                "event failed",
                handler=bundle.route.handler,
                event_id=str(attempt.envelope.event_id),
                state=str(attempt.state),
                error=attempt.failure.headline,
            )


def _ids(envelopes: Sequence[Envelope]) -> set[UUID]:
    return {envelope.event_id for envelope in envelopes}


def _killed(crash_count: int) -> KilledTheProcess:
    return KilledTheProcess(
        f"the process died each of the {crash_count} times that this event was in flight: killed, out of memory, "
        "or a crash in C code; it is not handled again by itself"
    )
