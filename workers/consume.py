"""One bundle of events, once.

In one transaction: record the events in `processed_events`, act, commit. Only then is the message
acknowledged, so a crash anywhere repeats the bundle and the record absorbs what was done. A bundle that
fails is rolled back and its events are taken one by one; those that fail are written to `deliveries`.
While Postgres is away the message is held: that spends no attempt. Nor does a server that is away for the handler
alone: its event is tried again later and holds up nobody. Neither does a transaction that was in another's way,
unless it is so time after time. A handler that takes too long is cut off, and the event that kills its process is
found (workers/suspects.py).
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TypeVar
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session

from domain.database import Sessions
from domain.unit_of_work import UnitOfWork, unit_of_work
from workers import deliveries
from workers.envelope import Envelope
from workers.failures import KilledTheProcess, TimeLimitExceeded, describe
from workers.gateways import Gateways
from workers.outages import asks_again, passes
from workers.pauses import HandlerPaused, require_at_work
from workers.routes import Route
from workers.suspects import MOST_STARTS, Suspect, one_at_a_time
from workers.telemetry import acting_on, acting_on_all, consuming, now_at_work
from workers.telemetry.meters import ConsumerMeters
from workers.time_limits import TimeLimits, Watch, backend_pid, exceeded

log = structlog.get_logger()

Result = TypeVar("Result")

_say_something = text("select")
_takes_writes = text("select current_setting('transaction_read_only') = 'off'")


# Some seconds of trying, with the pauses of `_wait`; then it is a failure like any other.
_MOST_CONFLICTS = 8
# So often may a server seem away while Postgres is there; then it is another one, that only the handler asks.
_MOST_ANSWERS = 5
#: Longest that events of a bundle say nothing to Postgres together, besides the time limit of one: it ends the session
#: of a process that says nothing for much longer (workers/bootstrap.py).
SILENT_SECONDS = 5.0
# Longest that an ordered bundle waits for the one before it to end, and how often it looks.
_PATIENCE_SECONDS, _LOOK_SECONDS = 1.0, 0.005
# How long the record of a stuck handler may take before its process ends all the same.
_GOODBYE_SECONDS = 10.0
_STUCK_EXIT_CODE = 70


class Stopping(Exception):
    """The process was told to stop while it waited for a server; the message goes back to its queue."""


class Consumer:
    """Acts on bundles for one process; safe to use from many threads."""

    def __init__(
        self,
        sessions: Sessions,
        gateways: Gateways,
        stopping: threading.Event | None = None,
        outage_pause_seconds: float = 1.0,
        await_schema: Callable[[], bool] | None = None,
        meters: ConsumerMeters | None = None,
    ) -> None:
        self._sessions = sessions
        self._gateways = gateways
        self._stopping = stopping or threading.Event()
        self._outage_pause_seconds = outage_pause_seconds
        self._await_schema = await_schema
        self.meters = meters or ConsumerMeters()
        self._time_limits = TimeLimits(self._end_stuck_process)
        self.keys = gateways.keys

    def consume(
        self,
        route: Route,
        envelopes: Sequence[Envelope],
        *,
        retry: bool = False,
        replay: UUID | None = None,
        suspect: Suspect | None = None,
    ) -> None:
        """Act on every event that the handler has not acted on yet; leave those that fail to their schedule.

        `retry` says that the message was sent for deliveries that are due: only those still due are taken.
        `replay` names the replay that has the handler act again on what it has acted on, once.
        `suspect` says that the message was in the hands of processes that died.
        Errors: Stopping, HandlerPaused.
        """
        if (await_schema := self._await_schema) is not None:
            # Deployed before the schema it is written for: the message is held, as while Postgres is away.
            if not await_schema():
                raise Stopping("the schema is older than this code")
            self._await_schema = None
        envelopes = sorted(envelopes, key=lambda envelope: envelope.position)
        with consuming(route, envelopes):
            if suspect is not None:
                self._carefully(route, envelopes, retry, replay, suspect)
                return
            failure = self._through_outages(route, envelopes, retry, replay)
            if failure is not None:
                self._one_by_one(route, envelopes, retry, replay, failure)

    def _one_by_one(
        self, route: Route, envelopes: Sequence[Envelope], retry: bool, replay: UUID | None, failure: BaseException
    ) -> None:
        alone = len(envelopes) == 1
        for envelope in envelopes:
            error = failure if alone else self._through_outages(route, [envelope], retry, replay)
            if error is not None:
                self._record(route, envelope, replay, error)

    def _carefully(
        self, route: Route, envelopes: Sequence[Envelope], retry: bool, replay: UUID | None, suspect: Suspect
    ) -> None:
        """One event at a time, each marked before it starts: one of them may kill this process."""
        log.warning(
            "message was in a dying process's hands; its events are taken one by one",
            handler=route.handler,
            events=len(envelopes),
            crashes=suspect.crashes,
        )
        for envelope in envelopes:
            with one_at_a_time(self._stop_if_told):
                starts = self._held(partial(suspect.starts, envelope.event_id))
                if starts >= MOST_STARTS:
                    self._bury(route, envelope, retry, replay, starts)
                    self._held(suspect.explained)
                    continue
                error = self._through_outages(route, [envelope], retry, replay, suspect)
                if error is not None:
                    self._record(route, envelope, replay, error)
        self._held(suspect.cleared)

    def _bury(self, route: Route, envelope: Envelope, retry: bool, replay: UUID | None, starts: int) -> None:
        if self._held(partial(self._is_open, route, envelope, retry, replay)):
            message = (
                f"the process died each of the {starts} times that this event was at work: killed, out of memory, "
                "or a crash in C code; it is not started again by itself"
            )
            self._record(route, envelope, replay, KilledTheProcess(message))

    def _is_open(self, route: Route, envelope: Envelope, retry: bool, replay: UUID | None) -> bool:
        """Neither done nor, by the same message, on record already."""
        with self._sessions() as session:
            to_do = _to_do(session, route, [envelope], retry, replay)
            if replay is not None:
                # Not committed: it only asks whether the handler would still act.
                return bool(to_do and UnitOfWork(session).again(route.handler, to_do, replay, as_retry=retry))
            return bool(to_do) and not deliveries.is_processed(session, route, envelope)

    def _stop_if_told(self) -> None:
        if self._stopping.is_set():
            raise Stopping

    def _record(self, route: Route, envelope: Envelope, replay: UUID | None, error: BaseException) -> None:
        now_at_work(route, (envelope,))
        failure = describe(error, envelope)
        so_far: deliveries.SoFar | None = None

        def write() -> str:
            nonlocal so_far
            with self._sessions() as session, session.begin():
                # As it was at the first try: the reply to its commit may be what was lost.
                so_far = so_far or deliveries.so_far(session, route, envelope)
                return deliveries.record_failure(session, route, envelope, error, failure, so_far, replay)

        state = self._held(write)
        self.meters.failed(route.handler, state)
        log.warning(
            "event failed",
            handler=route.handler,
            event_id=str(envelope.event_id),
            state=state,
            error=failure.headline,
        )

    def _through_outages(
        self,
        route: Route,
        envelopes: Sequence[Envelope],
        retry: bool,
        replay: UUID | None,
        suspect: Suspect | None = None,
    ) -> BaseException | None:
        """Act in one transaction; return what the handler raised, if anything."""
        now_at_work(route, envelopes)
        conflicts = answers = 0

        def act() -> BaseException | None:
            nonlocal conflicts, answers
            # The mark is not left standing while Postgres is waited for: whoever kills us then is not the event.
            with self._marked(suspect, envelopes):
                try:
                    with unit_of_work(self._sessions, keys=self.keys) as uow:
                        acted = self._act(uow, route, envelopes, retry, replay)
                except HandlerPaused:
                    raise
                except BaseException as error:  # sys.exit() in a handler, or a cancelled task, is its failure too
                    if passes(error):
                        answers += self._postgres_answers()
                        if answers <= _MOST_ANSWERS:
                            raise
                    if asks_again(error) and conflicts < _MOST_CONFLICTS:
                        conflicts += 1
                        raise
                    return error
            self.meters.acted(route.handler, acted, again=replay is not None)
            return None

        return self._held(act)

    @contextmanager
    def _marked(self, suspect: Suspect | None, envelopes: Sequence[Envelope]) -> Iterator[None]:
        if suspect is None:
            yield
            return
        (envelope,) = envelopes  # a suspect's events are taken one by one
        during, after = self._held(partial(suspect.at_work, envelope.event_id))
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

    def _act(
        self, uow: UnitOfWork, route: Route, envelopes: Sequence[Envelope], retry: bool, replay: UUID | None
    ) -> Sequence[Envelope]:
        """Act on those that are to be acted on; return them."""
        session = uow.session
        if retry or route.ordered or replay is not None:
            envelopes = _to_do(session, route, envelopes, retry, replay)
            if route.ordered and envelopes:
                envelopes = self._without_blocked(uow, route, envelopes, replay)
            if not envelopes:
                return []
            if replay is None:
                fresh = uow.once(route.handler, envelopes)
            else:
                fresh = uow.again(route.handler, envelopes, replay, as_retry=retry)
        else:
            fresh = deliveries.once_unless_failed(session, route, envelopes)
        if fresh:
            self._handle(uow, route, fresh, replay)
        else:
            require_at_work(session, route.handler)
        if retry:
            deliveries.resolve(session, route, envelopes)
        if route.ordered:
            deliveries.release(session, route, envelopes, replay)
        return fresh

    def _handle(self, uow: UnitOfWork, route: Route, fresh: Sequence[Envelope], replay: UUID | None) -> None:
        watch = Watch(route, uow.session, replay)

        def handle() -> None:
            if route.bulk:
                watch.next(fresh[0] if len(fresh) == 1 else None)
                with acting_on_all(route, fresh):
                    route.act(fresh, uow, self._gateways)
                return
            spoken_at = time.monotonic()
            for envelope in fresh:
                watch.next(envelope)
                if watch.began_at - spoken_at > SILENT_SECONDS:
                    uow.session.execute(_say_something)
                    spoken_at = watch.began_at
                with acting_on(route, envelope):
                    route.act(envelope.event, uow, self._gateways)
            now_at_work(route, fresh)

        try:
            self._time_limits.within(watch, handle)
        except TimeLimitExceeded:
            # It may have been in the middle of a statement: nobody is to use this connection again.
            uow.session.invalidate()
            raise
        finally:
            self.meters.handled(route.handler, [*watch.moments, time.monotonic()])

    def _end_stuck_process(self, watch: Watch) -> None:
        """End this process because a handler that was cut off did not notice; first write down which."""
        error = exceeded(watch).with_traceback(_traceback_of(watch.thread_id))
        log.critical(
            "handler does not notice that it was cut off: this process ends",
            handler=watch.route.handler,
            event_id=str(watch.envelope.event_id) if watch.envelope else None,
            exc_info=error,
        )
        if watch.envelope is not None:
            # In a thread: Postgres may be away, and then the crash is counted instead (workers/suspects.py).
            record = threading.Thread(target=self._record_stuck, args=(watch, watch.envelope, error), daemon=True)
            record.start()
            record.join(_GOODBYE_SECONDS)
        os._exit(_STUCK_EXIT_CODE)

    def _record_stuck(self, watch: Watch, envelope: Envelope, error: BaseException) -> None:
        pid = backend_pid(watch.session)
        with self._sessions() as session, session.begin():
            # Its transaction ends with its connection; a retry holds the row that is to be written.
            deliveries.end_backend(session, pid)
            so_far = deliveries.so_far(session, watch.route, envelope)
            failure = describe(error, envelope)
            deliveries.record_failure(session, watch.route, envelope, error, failure, so_far, watch.replay)

    def _without_blocked(
        self, uow: UnitOfWork, route: Route, envelopes: Sequence[Envelope], replay: UUID | None
    ) -> list[Envelope]:
        give_up_at = time.monotonic() + _PATIENCE_SECONDS
        found = deliveries.blocked(uow.session, route, envelopes, replay)
        while found.at_work is not None and self._is_settled_soon(uow.session, route, found.at_work, give_up_at):
            found = deliveries.blocked(uow.session, route, envelopes, replay)
        if found.envelopes:
            deliveries.park(uow.session, route, found.envelopes, replay)
            self.meters.parked(route.handler, len(found.envelopes))
        parked = {envelope.event_id for envelope in found.envelopes}
        return [envelope for envelope in envelopes if envelope.event_id not in parked]

    def _is_settled_soon(self, session: Session, route: Route, event_id: UUID, give_up_at: float) -> bool:
        """Wait for a worker that has just begun with the bundle before this one, as it is with a backlog.

        Putting ours behind it instead would have the relay send each event again, and the next bundle wait for those.
        """
        while not deliveries.is_settled(session, route, event_id):
            if time.monotonic() > give_up_at or self._stopping.wait(_LOOK_SECONDS):
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
                # A record that cannot be written for any reason is held too: acknowledging would lose it.
                tries += 1
                self._wait(error, tries)

    def _wait(self, error: Exception, tries: int) -> None:
        pause = min(self._outage_pause_seconds, 0.01 * 2 ** min(tries, 10)) * random.uniform(0.5, 1.0)
        if (tries in (5, 50) or tries % 500 == 0) and not asks_again(error):
            log.warning("waiting for postgres", tries=tries, error=f"{type(error).__name__}: {error}")
        if self._stopping.wait(pause):
            raise Stopping from error


def _to_do(
    session: Session, route: Route, envelopes: Sequence[Envelope], retry: bool, replay: UUID | None
) -> list[Envelope]:
    """Leave out what another message or an operator has to do with by now.

    Errors: HandlerPaused.
    """
    if retry:
        found = deliveries.still_due(session, route, envelopes, replay)
    else:
        found = deliveries.not_yet_failed(session, route, envelopes)
    if not found:
        require_at_work(session, route.handler)
    return found


def _traceback_of(thread_id: int) -> TracebackType | None:
    """Return where the thread is now, as if it had raised there."""
    frame = sys._current_frames().get(thread_id)
    found: TracebackType | None = None
    while frame is not None:
        found = TracebackType(found, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return found
