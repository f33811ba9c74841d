"""Handlers that take too long are cut off. One thread watches all others of the process.

A handler is cut off twice over: an exception is raised in its thread, and the statement that its connection
waits for is cancelled. Python raises only between two of its own steps: a handler that hangs in C code, on a
socket without a time-out say, does not notice. Then `stuck` is called, which ends the process.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from uuid import UUID

import structlog
from sqlalchemy.orm import Session

from dovecote.envelope import Envelope
from dovecote.route import Route
from dovecote.store.connections import driver_connection
from dovecote.telemetry.failures import TimeLimitExceeded

log = structlog.get_logger()

#: How long a handler that was cut off may take to notice, or to clean up.
GRACE_SECONDS = 10.0

_POLL_INTERVAL_SECONDS = 0.2


class CutOff(BaseException):
    """Raised inside of the handler. No Exception, and no DovecoteError: no `except` of a handler may swallow it."""


class Watch:
    """One handler in flight, in the thread that makes it."""

    def __init__(self, route: Route, session: Session, replay: UUID | None = None) -> None:
        self.route = route
        self.replay = replay
        self.seconds = route.time_limit_seconds
        self.thread_id = threading.get_ident()
        self.session = session
        #: The event in flight, None while it is a whole bundle.
        self.envelope: Envelope | None = None
        #: When each call of the handler began, by time.monotonic().
        self.call_times: list[float] = []
        self.began_at = time.monotonic()
        self.deadline = self.began_at + self.seconds
        self.was_cut_off = False
        self.ended = False
        self._lock = threading.Lock()

    def next(self, envelope: Envelope | None) -> None:
        """Begin a call of the handler: the limit is for each of them."""
        self.envelope = envelope
        self.began_at = time.monotonic()
        self.call_times.append(self.began_at)
        self.deadline = self.began_at + self.seconds

    def cut_off(self) -> None:
        with self._lock:
            if self.ended:
                return
            self.was_cut_off = True
            self.deadline += GRACE_SECONDS
            _raise_in(self.thread_id, CutOff)
        _cancel_statement(self.session)

    def end(self) -> None:
        """From when this returns, nothing is raised in this thread any more."""
        with self._lock:
            self.ended = True
            if self.was_cut_off:
                _raise_in(self.thread_id, None)


class TimeLimits:
    """The watching thread, started with the first handler. `stuck` is called in it and must not return."""

    def __init__(self, stuck: Callable[[Watch], None]) -> None:
        self._stuck = stuck
        self._watches: dict[int, Watch] = {}
        self._something_to_watch = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def within(self, watch: Watch, work: Callable[[], None]) -> None:
        """Run `work`; raise TimeLimitExceeded even if it swallowed the interrupt.

        Errors: TimeLimitExceeded, with the traceback of where it was; what the work raises.
        """
        self._start()
        cut_off: BaseException | None = None
        self._watches[watch.thread_id] = watch
        self._something_to_watch.set()
        try:
            try:
                work()
            finally:
                watch.end()
        except BaseException as error:
            if not watch.was_cut_off:
                raise
            cut_off = error
        finally:
            watch.ended = True
            del self._watches[watch.thread_id]
        if watch.was_cut_off:
            raise exceeded(watch).with_traceback(cut_off.__traceback__ if cut_off else None) from None

    def _start(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="time limits", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            if not self._watches:
                # An idle process sleeps. Cleared first: a watch that begins in between sets it again.
                self._something_to_watch.clear()
                if not self._watches:
                    self._something_to_watch.wait()
            now = time.monotonic()
            for watch in list(self._watches.values()):
                if now < watch.deadline or watch.ended:
                    continue
                if watch.was_cut_off:
                    self._stuck(watch)
                else:
                    log.warning("handler is cut off", handler=watch.route.handler, time_limit_seconds=watch.seconds)
                    watch.cut_off()
            time.sleep(_POLL_INTERVAL_SECONDS)  # a watch has no end to await: it is its handlers that end


def exceeded(watch: Watch) -> TimeLimitExceeded:
    return TimeLimitExceeded(
        f"{watch.route.handler} was cut off after {watch.seconds:g} s, the time limit of its route (time_limit_seconds)"
    )


def backend_pid(session: Session) -> int | None:
    """Return the process that serves the session in Postgres, if it is in a transaction; no network is used."""
    return driver_connection(session).info.backend_pid if session.in_transaction() else None


def _cancel_statement(session: Session) -> None:
    try:
        if session.in_transaction():
            driver_connection(session).cancel_safe(timeout=2)
    except Exception as error:  # best effort: the exception in the thread, or the end of the process, follows
        log.debug("statement not cancelled", error=f"{type(error).__name__}: {error}")


def _raise_in(thread_id: int, exception: type[BaseException] | None) -> None:
    """Raise between two of the thread's next steps; None withdraws what was not raised yet.

    Dramatiq's raise_thread_exception() cannot withdraw.
    """
    to_raise = ctypes.py_object(exception) if exception else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id), to_raise)
