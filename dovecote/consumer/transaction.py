"""The transaction of a bundle: which of its events are handled, the calls of the handler, and what they release."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import text

from dovecote.consumer.time_limits import TimeLimits, Watch
from dovecote.consumer.transaction_guard import TransactionGuard
from dovecote.envelope import Envelope
from dovecote.route import require_nothing_returned
from dovecote.store.bundle import Bundle
from dovecote.store.deliveries import Deliveries
from dovecote.store.lookup import require_same_history
from dovecote.store.pauses import require_not_paused
from dovecote.telemetry.context import set_in_flight
from dovecote.telemetry.failures import TimeLimitExceeded
from dovecote.telemetry.instrumentation import ConsumerInstrumentation
from dovecote.telemetry.traces import acting_on, acting_on_all
from dovecote.unit_of_work import UnitOfWork

#: Longest that the events of a bundle send nothing to Postgres together, besides the time limit of one: Postgres ends
#: the session of a process that is silent for much longer (dovecote/bootstrap.py).
MAX_SILENCE_SECONDS = 5.0
# Longest that an ordered bundle waits for the one before it to commit, and how often it looks.
_ORDERED_WAIT_SECONDS, _POLL_INTERVAL_SECONDS = 1.0, 0.005

_keep_alive = text("select")


class Outcome(NamedTuple):
    """What became of a bundle's events in a transaction that committed.

    acted   the handler was called for them
    parked  they wait behind an earlier event of their aggregate
    absent  they are not in the outbox
    """

    acted: Sequence[Envelope] = ()
    parked: Sequence[Envelope] = ()
    absent: Sequence[Envelope] = ()


class BundleTransaction:
    """Acts on a bundle in the transaction of a unit of work, which the caller commits."""

    def __init__(
        self,
        uow: UnitOfWork,
        bundle: Bundle,
        *,
        gateways: Any,
        stopping: threading.Event,
        time_limits: TimeLimits,
        instrumentation: ConsumerInstrumentation,
        history_in_redis: Callable[[], str | None],
    ) -> None:
        self._uow = uow
        self._bundle = bundle
        self._route = bundle.route
        self._deliveries = Deliveries(uow.session, bundle.route, bundle.replay)
        self._gateways = gateways
        self._stopping = stopping
        self._time_limits = time_limits
        self._instrumentation = instrumentation
        self._history_in_redis = history_in_redis

    def act(self) -> Outcome:
        """Call the handler for the events that it has not acted on, and that need not wait.

        Errors: HandlerPaused, OtherHistory; what the handler raises, and what Postgres does.
        """
        if self._bundle.retry or self._bundle.replay is not None or self._route.ordered:
            return self._act_in_steps()
        return self._act_at_once()

    def _act_at_once(self) -> Outcome:
        """Find out what is new and record it in one statement: most messages are of this kind."""
        found = self._deliveries.once_unless_failed(self._bundle)
        require_same_history(self._uow.session, found, self._history_in_redis)
        self._handle(found.to_do)
        return Outcome(found.to_do, (), found.absent)

    def _act_in_steps(self) -> Outcome:
        """Retries, replays and ordered handlers: lock what is due, park what is blocked, then handle the rest."""
        bundle, route = self._bundle, self._route
        found = self._deliveries.due(bundle)
        require_same_history(self._uow.session, found, self._history_in_redis)
        free, parked = found.to_do, list[Envelope]()
        if route.ordered and free:
            free, parked = self._without_blocked(free)
        if not free:
            return Outcome((), parked, found.absent)
        if bundle.replay is None:
            fresh = self._uow.once(route.handler, free)
        else:
            fresh = self._uow.again(route.handler, free, bundle.replay, as_retry=bundle.retry)
        self._handle(fresh)
        if bundle.retry:
            self._deliveries.resolve(free)
        # A duplicate releases nothing: what waits behind it may wait for another event.
        done = free if bundle.retry else fresh
        if route.ordered and done:
            self._deliveries.release_next(done)
        return Outcome(fresh, parked, found.absent)

    # The calls of the handler ----------------------------------------------------------------

    def _handle(self, fresh: Sequence[Envelope]) -> None:
        """Call the handler, for each event or with `bulk` for all, and check its transaction after each call."""
        if not fresh:
            require_not_paused(self._uow.session, self._route.handler)
            return
        session = self._uow.session
        watch = Watch(self._route, session, self._bundle.replay)
        guard = TransactionGuard(session, self._route.handler)
        call_all = self._call_with_all if self._route.bulk else self._call_with_each
        try:
            with guard.on_watch():
                self._time_limits.within(watch, lambda: call_all(fresh, watch, guard))
        except BaseException as error:
            # Cut off, or in the middle of a statement: the connection can neither be used again nor roll back.
            if isinstance(error, TimeLimitExceeded) or not guard.can_roll_back():
                session.invalidate()
            raise
        finally:
            self._instrumentation.handled(self._route.handler, [*watch.call_times, time.monotonic()])

    def _call_with_all(self, fresh: Sequence[Envelope], watch: Watch, guard: TransactionGuard) -> None:
        watch.next(fresh[0] if len(fresh) == 1 else None)
        with acting_on_all(self._route, fresh):
            self._call(fresh, guard)

    def _call_with_each(self, fresh: Sequence[Envelope], watch: Watch, guard: TransactionGuard) -> None:
        last_statement_at = time.monotonic()
        for envelope in fresh:
            watch.next(envelope)
            if watch.began_at - last_statement_at > MAX_SILENCE_SECONDS:
                self._uow.session.execute(_keep_alive)
                last_statement_at = watch.began_at
            with acting_on(self._route, envelope):
                self._call(envelope.event, guard)
        # A failure from here on, such as of a deferred write, is not that of a single event.
        set_in_flight(self._route, fresh)

    def _call(self, argument: object, guard: TransactionGuard) -> None:
        require_nothing_returned(self._route.handler, self._route.function(argument, self._uow, self._gateways))
        guard.check()

    # Order -----------------------------------------------------------------------------------

    def _without_blocked(self, envelopes: list[Envelope]) -> tuple[list[Envelope], list[Envelope]]:
        """Park the events that must wait; return the others, and what was parked."""
        give_up_at = time.monotonic() + _ORDERED_WAIT_SECONDS
        blocked = self._deliveries.blocked(envelopes)
        while blocked.in_flight is not None and self._is_finished_soon(blocked.in_flight, give_up_at):
            blocked = self._deliveries.blocked(envelopes)
        if blocked.envelopes:
            self._deliveries.park(blocked.envelopes)
            self._instrumentation.parked(self._route.handler, len(blocked.envelopes))
        parked = {envelope.event_id for envelope in blocked.envelopes}
        return [envelope for envelope in envelopes if envelope.event_id not in parked], blocked.envelopes

    def _is_finished_soon(self, event_id: UUID, give_up_at: float) -> bool:
        """Wait for the worker that has just begun with the bundle before this one, as there is one with a backlog.

        Parking this bundle instead would have the relay send each of its events again, and the next bundle wait for
        those.
        """
        while not self._deliveries.is_finished(event_id):
            if time.monotonic() > give_up_at or self._stopping.wait(_POLL_INTERVAL_SECONDS):
                return False
        return True
