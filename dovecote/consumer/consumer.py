"""One bundle of events, once.

In one transaction: record the events in `processed_events`, act, commit. Only then is the message
acknowledged, so a crash anywhere repeats the bundle and the record absorbs what was done. A bundle that
fails is rolled back and taken in parts (dovecote/store/bundle.py); events that fail alone are written to `deliveries`.
Events that cannot be read are written there at once, without a transaction of their handler's.
While Postgres is away the message is held: that spends no attempt. Nor does a server that is away for the handler
alone: its event is tried again later and holds up nobody. Neither does a transaction that was in another's way,
unless it is so time after time. A handler that takes too long is cut off, and the event that kills its process is
found (dovecote/broker/poison.py).
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session

from dovecote.broker.poison import MAX_STARTS, Suspect, one_at_a_time
from dovecote.consumer.attempts import Attempt, SoFar, attempts_so_far, record_failures
from dovecote.consumer.stuck import end_stuck_process
from dovecote.consumer.time_limits import TimeLimits, Watch
from dovecote.consumer.transaction_guard import TransactionGuard
from dovecote.database import Sessions
from dovecote.envelope import Contents, Envelope
from dovecote.envelope.message_reader import MessageReader, Received
from dovecote.envelope.signatures import MessageKeys
from dovecote.errors import DovecoteError
from dovecote.privacy import Keyring
from dovecote.route import Route, require_nothing_returned
from dovecote.store import deliveries, lookup
from dovecote.store.bundle import Bundle, Parts
from dovecote.store.pauses import HandlerPaused, require_at_work
from dovecote.telemetry.context import event_in_flight, set_in_flight
from dovecote.telemetry.failures import (
    KilledTheProcess,
    TimeLimitExceeded,
    UnknownHandler,
    describe,
    is_conflict,
    is_transient,
)
from dovecote.telemetry.instrumentation import ConsumerInstrumentation
from dovecote.telemetry.traces import acting_on, acting_on_all, consuming
from dovecote.unit_of_work import UnitOfWork, unit_of_work

log = structlog.get_logger()

Result = TypeVar("Result")

_say_something = text("select")
_takes_writes = text("select current_setting('transaction_read_only') = 'off'")


# Some seconds of trying, with the pauses of `_wait`; then it is a failure like any other.
_MAX_CONFLICTS = 8
# So often may a server seem away while Postgres is there; then it is another one, that only the handler asks.
_MAX_ANSWERS = 5
#: Longest that events of a bundle say nothing to Postgres together, besides the time limit of one: it ends the session
#: of a process that says nothing for much longer (dovecote/bootstrap.py).
SILENT_SECONDS = 5.0
# Longest that an ordered bundle waits for the one before it to end, and how often it looks.
_PATIENCE_SECONDS, _POLL_INTERVAL_SECONDS = 1.0, 0.005


@dataclass(frozen=True)
class Failed:
    """What a handler raised, and the event that it was called for then; None where it was the whole bundle."""

    error: BaseException
    blamed: Envelope | None


class _Done(NamedTuple):
    """What became of a bundle's events in a transaction that is to commit."""

    acted: Sequence[Envelope] = ()
    parked: Sequence[Envelope] = ()
    absent: Sequence[Envelope] = ()


class Stopping(DovecoteError):
    """The process was told to stop while it waited for a server; the message goes back to its queue."""


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
        self._outage_max_backoff_seconds = outage_max_backoff_seconds
        self._await_schema = await_schema
        self.instrumentation = instrumentation or ConsumerInstrumentation()
        self._time_limits = TimeLimits(partial(end_stuck_process, sessions))
        self.keys = keyring
        self.message_keys = MessageKeys(sessions)
        self._opener = MessageReader(sessions, self.message_keys, keyring, self._held)
        #: Returns the history in which the messages were sent that this is called with; None where nobody knows.
        self.history_in_redis: Callable[[], str | None] = lambda: None

    def open(self, received: Received, route: Route | None) -> Contents:
        """Return what a relay has put into the message; nothing of it is believed before.

        Errors: RefusedMessage, Stopping.
        """
        if (await_schema := self._await_schema) is not None:
            # Deployed before the schema it is written for: the message is held, as while Postgres is away.
            if not await_schema():
                raise Stopping("the schema is older than this code")
            self._await_schema = None
        return self._opener.open(received, route.queue if route else None)

    def consume(
        self,
        route: Route,
        envelopes: Sequence[Envelope],
        *,
        retry: bool = False,
        replay: UUID | None = None,
        suspect: Suspect | None = None,
        sent_in: str | None = None,
    ) -> None:
        """Act on every event that the handler has not acted on yet; leave those that fail to their schedule.

        `retry` says that the message was sent for deliveries that are due: only those still due are taken.
        `replay` names the replay that has the handler act again on what it has acted on, once.
        `suspect` says that the message was in the hands of processes that died.
        `sent_in` is the run of Postgres in which the relay has read the events, where the message says so: in another
        run they are looked up, and what is not in the outbox is passed over.
        Errors: Stopping, HandlerPaused.
        """
        bundle = Bundle(route, sorted(envelopes, key=lambda envelope: envelope.position), retry, replay, sent_in)
        with consuming(route, bundle.envelopes):
            if suspect is not None:
                self._carefully(bundle, suspect)
                return
            parts = Parts(self._readable(bundle))
            while part := parts.next():
                failed = self._through_outages(bundle.of(part))
                if failed is None:
                    parts.succeeded()
                elif len(part) > 1:
                    parts.failed(failed.blamed, was_slow=isinstance(failed.error, TimeLimitExceeded))
                else:
                    self._record(bundle.of(part), {part[0].event_id: failed.error})
                    parts.was_bad()

    def keep_for_other_code(
        self,
        route: Route,
        envelopes: Sequence[Envelope],
        *,
        retry: bool = False,
        replay: UUID | None = None,
        suspect: Suspect | None = None,
        sent_in: str | None = None,
    ) -> None:
        """Leave every event to its schedule: no route of this process has the handler.

        Errors: Stopping, HandlerPaused.
        """
        error = UnknownHandler("no route of this process has the handler: newer code, or older, will come and act")
        with consuming(route, envelopes):
            errors = {envelope.event_id: error for envelope in envelopes}
            self._record(Bundle(route, envelopes, retry, replay, sent_in), errors, if_open=True)
            if suspect is not None:
                self._held(suspect.cleared)

    def _readable(self, bundle: Bundle) -> Sequence[Envelope]:
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
            return bundle.envelopes
        unreadable = [envelope for envelope in bundle.envelopes if envelope.event_id in errors]
        self._record(bundle.of(unreadable), errors, if_open=True)
        return [envelope for envelope in bundle.envelopes if envelope.event_id not in errors]

    def _carefully(self, bundle: Bundle, suspect: Suspect) -> None:
        """One event at a time, each marked before it starts: one of them may kill this process."""
        log.warning(
            "message was in a dying process's hands; its events are taken one by one",
            handler=bundle.route.handler,
            events=len(bundle.envelopes),
            crashes=suspect.crashes,
        )
        for envelope in bundle.envelopes:
            alone = bundle.of([envelope])
            with one_at_a_time(self._stop_if_told):
                starts = self._held(partial(suspect.starts, envelope.event_id))
                if starts >= MAX_STARTS:
                    self._record(alone, {envelope.event_id: _killed(starts)}, if_open=True)
                    self._held(suspect.explained)
                    continue
                failed = self._through_outages(alone, suspect)
                if failed is not None:
                    self._record(alone, {envelope.event_id: failed.error})
        self._held(suspect.cleared)

    def _stop_if_told(self) -> None:
        if self._stopping.is_set():
            raise Stopping

    def _record(self, bundle: Bundle, errors: Mapping[UUID, BaseException], *, if_open: bool = False) -> None:
        """Write down in one transaction that each event of the bundle has failed, with its error.

        Not of one that is not in the outbox: Postgres may have gone back since the handler was called.
        `if_open`: it was not tried just now, and may be done, or on record already.
        Errors: HandlerPaused with `if_open`.
        """
        attempts = [_attempt(bundle.route, envelope, errors[envelope.event_id]) for envelope in bundle.envelopes]
        so_far: dict[UUID, SoFar] | None = None

        def write() -> tuple[list[Attempt], list[str], Sequence[Envelope]]:
            nonlocal so_far
            with self._sessions() as session, session.begin():
                found = lookup.look_up(session, bundle)
                lookup.require_same_history(session, found, self.history_in_redis)
                if so_far is None:
                    # As it was at the first try: the reply to its commit may be what was lost.
                    those = deliveries.still_open(session, bundle.of(found.to_do)) if if_open else found.to_do
                    so_far = attempts_so_far(session, bundle.route, those)
                there = {envelope.event_id for envelope in found.to_do} & so_far.keys()
                failed = [attempt for attempt in attempts if attempt.envelope.event_id in there]
                return failed, record_failures(session, bundle.route, failed, so_far, bundle.replay), found.absent

        failed, states, absent = self._held(write)
        lookup.report(bundle.route, absent, self.instrumentation)
        for attempt, state in zip(failed, states, strict=True):
            set_in_flight(bundle.route, (attempt.envelope,))
            self.instrumentation.failed(bundle.route.handler, state)
            log.warning(
                "event failed",
                handler=bundle.route.handler,
                event_id=str(attempt.envelope.event_id),
                state=state,
                error=attempt.failure.headline,
            )

    def _through_outages(self, bundle: Bundle, suspect: Suspect | None = None) -> Failed | None:
        """Act in one transaction; return what the handler raised, if anything."""
        route = bundle.route
        set_in_flight(route, bundle.envelopes)
        conflicts = answers = 0
        done = _Done()

        def act() -> Failed | None:
            nonlocal conflicts, answers, done
            # The mark is not left standing while Postgres is waited for: whoever kills us then is not the event.
            with self._marked(suspect, bundle.envelopes):
                try:
                    with unit_of_work(self._sessions, keys=self.keys) as uow:
                        done = self._act(uow, bundle)
                except (HandlerPaused, lookup.OtherHistory):
                    raise
                except BaseException as error:  # sys.exit() in a handler, or a cancelled task, is its failure too
                    if is_transient(error):
                        answers += self._postgres_answers()
                        if answers <= _MAX_ANSWERS:
                            raise
                    if is_conflict(error) and conflicts < _MAX_CONFLICTS:
                        conflicts += 1
                        raise
                    return Failed(error, event_in_flight())
            self.instrumentation.acted(route.handler, done.acted, again=bundle.replay is not None)
            lookup.report(route, done.absent, self.instrumentation)
            return None

        failure = self._held(act)
        if failure is None and done.parked:
            self._held(partial(self._release_parked, route, done.parked))
        return failure

    def _release_parked(self, route: Route, parked: Sequence[Envelope]) -> None:
        with self._sessions() as session, session.begin():
            deliveries.release_parked(session, route, parked)

    @contextmanager
    def _marked(self, suspect: Suspect | None, envelopes: Sequence[Envelope]) -> Iterator[None]:
        if suspect is None:
            yield
            return
        (envelope,) = envelopes  # a suspect's events are taken one by one
        during, after = self._held(partial(suspect.in_flight, envelope.event_id))
        # Held: a Redis that takes no mark is no failure of the event.
        self._held(partial(suspect.write, during))
        try:
            yield
        finally:
            self._held(partial(suspect.write, after))

    def _postgres_answers(self) -> bool:
        try:
            with self._sessions() as session:
                return bool(session.scalar(_takes_writes))
        except Exception:
            return False

    def _act(self, uow: UnitOfWork, bundle: Bundle) -> "_Done":
        """Act on those that are to be acted on."""
        session, route, replay = uow.session, bundle.route, bundle.replay
        parked: Sequence[Envelope] = ()
        if bundle.retry or route.ordered or replay is not None:
            found = deliveries.to_do(session, bundle)
            lookup.require_same_history(session, found, self.history_in_redis)
            to_do = bundle.of(found.to_do)
            if route.ordered and to_do.envelopes:
                to_do, parked = self._without_blocked(uow, to_do)
            if not to_do.envelopes:
                return _Done([], parked, found.absent)
            if replay is None:
                fresh = uow.once(route.handler, to_do.envelopes)
            else:
                fresh = uow.again(route.handler, to_do.envelopes, replay, as_retry=bundle.retry)
        else:
            found = deliveries.once_unless_failed(session, bundle)
            lookup.require_same_history(session, found, self.history_in_redis)
            to_do, fresh = bundle, found.to_do
        if fresh:
            self._handle(uow, bundle.of(fresh))
        else:
            require_at_work(session, route.handler)
        if bundle.retry:
            deliveries.resolve(session, route, to_do.envelopes)
        # A duplicate has released nobody: what waits behind it may wait for another.
        done = to_do.envelopes if bundle.retry else fresh
        if route.ordered and done:
            deliveries.release_next(session, route, done, replay)
        return _Done(fresh, parked, found.absent)

    def _handle(self, uow: UnitOfWork, bundle: Bundle) -> None:
        """Call the handler, for each event or with `bulk` for all, and look at its transaction after each call."""
        route, fresh = bundle.route, bundle.envelopes
        watch = Watch(route, uow.session, bundle.replay)
        guard = TransactionGuard(uow.session, route.handler)

        def call(argument: object) -> None:
            require_nothing_returned(route.handler, route.function(argument, uow, self._gateways))
            guard.check()

        def handle() -> None:
            if route.bulk:
                watch.next(fresh[0] if len(fresh) == 1 else None)
                with acting_on_all(route, fresh):
                    call(fresh)
                return
            spoken_at = time.monotonic()
            for envelope in fresh:
                watch.next(envelope)
                if watch.began_at - spoken_at > SILENT_SECONDS:
                    uow.session.execute(_say_something)
                    spoken_at = watch.began_at
                with acting_on(route, envelope):
                    call(envelope.event)
            # What fails from here on, such as a write that was put off, is no single event's.
            set_in_flight(route, fresh)

        try:
            with guard.on_watch():
                self._time_limits.within(watch, handle)
        except BaseException as error:
            # Cut off, or left in the middle of a statement: nobody is to use this connection again, nor can roll back.
            if isinstance(error, TimeLimitExceeded) or not guard.can_roll_back():
                uow.session.invalidate()
            raise
        finally:
            self.instrumentation.handled(route.handler, [*watch.moments, time.monotonic()])

    def _without_blocked(self, uow: UnitOfWork, bundle: Bundle) -> tuple[Bundle, Sequence[Envelope]]:
        """Park those that must wait; return the others, and what was parked."""
        route, envelopes, replay = bundle.route, bundle.envelopes, bundle.replay
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        found = deliveries.blocked(uow.session, route, envelopes, replay)
        while found.in_flight is not None and self._is_settled_soon(uow.session, route, found.in_flight, give_up_at):
            found = deliveries.blocked(uow.session, route, envelopes, replay)
        if found.envelopes:
            deliveries.park(uow.session, route, found.envelopes, replay)
            self.instrumentation.parked(route.handler, len(found.envelopes))
        parked = {envelope.event_id for envelope in found.envelopes}
        return bundle.of([envelope for envelope in envelopes if envelope.event_id not in parked]), found.envelopes

    def _is_settled_soon(self, session: Session, route: Route, event_id: UUID, give_up_at: float) -> bool:
        """Wait for a worker that has just begun with the bundle before this one, as it is with a backlog.

        Putting ours behind it instead would have the relay send each event again, and the next bundle wait for those.
        """
        while not deliveries.is_settled(session, route, event_id):
            if time.monotonic() > give_up_at or self._stopping.wait(_POLL_INTERVAL_SECONDS):
                return False
        return True

    def _held(self, work: Callable[[], Result]) -> Result:
        """Do the work, again and again while a server is away."""
        tries = 0
        while True:
            try:
                return work()
            except HandlerPaused:
                raise
            except Exception as error:
                # A record that cannot be written for any reason is held too: acknowledging would lose it, and handed
                # back it would come to the next worker at once.
                tries += 1
                self._wait(error, tries)

    def _wait(self, error: Exception, tries: int) -> None:
        pause = min(self._outage_max_backoff_seconds, 0.01 * 2 ** min(tries, 10)) * random.uniform(0.5, 1.0)
        if (tries in (5, 50) or tries % 500 == 0) and not is_conflict(error):
            if is_transient(error):
                log.warning("waiting for postgres", tries=tries, error=f"{type(error).__name__}: {error}")
            else:
                log.error(
                    "what became of an event cannot be written, and this does not pass by itself: its message is held",
                    tries=tries,
                    error=f"{type(error).__name__}: {error}",
                )
        if self._stopping.wait(pause):
            raise Stopping from error


def _attempt(route: Route, envelope: Envelope, error: BaseException) -> Attempt:
    return Attempt(envelope, error, describe(error, envelope))


def _killed(starts: int) -> KilledTheProcess:
    return KilledTheProcess(
        f"the process died each of the {starts} times that this event was at work: killed, out of memory, "
        "or a crash in C code; it is not started again by itself"
    )
