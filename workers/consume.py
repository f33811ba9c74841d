"""One bundle of events, once.

In one transaction: record the events in `processed_events`, act, commit. Only then is the message
acknowledged, so a crash anywhere repeats the bundle and the record absorbs what was done. A bundle that
fails is rolled back and its events are taken one by one; those that fail are written to `deliveries`.
While Postgres is away the message is held: that spends no attempt. Neither does a transaction that was in
another's way, unless it is so time after time.
"""

import random
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from domain.database import Sessions
from domain.unit_of_work import UnitOfWork, unit_of_work
from workers import deliveries
from workers.envelope import Envelope
from workers.failures import describe
from workers.gateways import Gateways
from workers.outages import asks_again, passes
from workers.routes import Route
from workers.telemetry import links_to, tracer

log = structlog.get_logger()

Result = TypeVar("Result")

# Some seconds of trying, with the pauses of `_wait`; then it is a failure like any other.
_MOST_CONFLICTS = 8


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
    ) -> None:
        self._sessions = sessions
        self._gateways = gateways
        self._stopping = stopping or threading.Event()
        self._outage_pause_seconds = outage_pause_seconds
        self._await_schema = await_schema
        self.keys = gateways.keys

    def consume(self, route: Route, envelopes: Sequence[Envelope], *, retry: bool = False) -> None:
        """Act on every event that the handler has not acted on yet; leave those that fail to their schedule.

        `retry` says that the message was sent for deliveries that are due: only those still due are taken.
        Errors: Stopping.
        """
        if self._await_schema is not None:
            # Deployed before the schema it is written for: the message is held, as while Postgres is away.
            if not self._await_schema():
                raise Stopping("the schema is older than this code")
            self._await_schema = None
        envelopes = sorted(envelopes, key=lambda envelope: envelope.position)
        with tracer.start_as_current_span(
            "consume.bundle",
            attributes={
                "messaging.system": "dovecote",
                "messaging.operation.type": "process",
                "messaging.destination.name": route.queue,
                "messaging.batch.message_count": len(envelopes),
                "dovecote.handler": route.handler,
            },
        ) as span:
            # A link for each event costs as much as acting on it: only for the bundles whose trace is kept.
            if span.is_recording():
                for link in links_to(envelope.traceparent for envelope in envelopes):
                    span.add_link(link.context)
            failure = self._through_outages(route, envelopes, retry)
            if failure is not None:
                self._one_by_one(route, envelopes, retry, failure)

    def _one_by_one(self, route: Route, envelopes: Sequence[Envelope], retry: bool, failure: BaseException) -> None:
        alone = len(envelopes) == 1
        for envelope in envelopes:
            error = failure if alone else self._through_outages(route, [envelope], retry)
            if error is not None:
                self._record(route, envelope, error)

    def _record(self, route: Route, envelope: Envelope, error: BaseException) -> None:
        failure = describe(error, envelope)

        def write() -> str:
            with self._sessions() as session, session.begin():
                return deliveries.record_failure(session, route, envelope, error, failure)

        state = self._held(write)
        log.warning(
            "event failed",
            handler=route.handler,
            event_id=str(envelope.event_id),
            state=state,
            error=failure.headline,
        )

    def _through_outages(self, route: Route, envelopes: Sequence[Envelope], retry: bool) -> BaseException | None:
        """Act in one transaction; return what the handler raised, if anything."""
        conflicts = 0

        def act() -> BaseException | None:
            nonlocal conflicts
            try:
                with unit_of_work(self._sessions, keys=self.keys) as uow:
                    self._act(uow, route, envelopes, retry)
            except BaseException as error:  # sys.exit() in a handler, or a cancelled task, is its failure too
                if passes(error):
                    raise
                if asks_again(error) and conflicts < _MOST_CONFLICTS:
                    conflicts += 1
                    raise
                return error
            return None

        return self._held(act)

    def _act(self, uow: UnitOfWork, route: Route, envelopes: Sequence[Envelope], retry: bool) -> None:
        session = uow.session
        pick = deliveries.still_due if retry else deliveries.not_yet_failed
        envelopes = pick(session, route, envelopes)
        if route.ordered and envelopes:
            envelopes = self._without_blocked(uow, route, envelopes)
        if not envelopes:
            return
        fresh = uow.once(route.handler, envelopes)
        if fresh and route.bulk:
            route.act(fresh, uow, self._gateways)
        elif fresh:
            for envelope in fresh:
                route.act(envelope.event, uow, self._gateways)
        if retry:
            deliveries.resolve(session, route, envelopes)
        if route.ordered:
            deliveries.release(session, route, envelopes)

    def _without_blocked(self, uow: UnitOfWork, route: Route, envelopes: Sequence[Envelope]) -> list[Envelope]:
        blocked = deliveries.blocked(uow.session, route, envelopes)
        if blocked:
            deliveries.park(uow.session, route, blocked)
        return [envelope for envelope in envelopes if envelope not in blocked]

    def _held(self, work: Callable[[], Result]) -> Result:
        """Do the work, again and again while a server is away."""
        tries = 0
        while True:
            try:
                return work()
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
