"""The end of a process whose handler was cut off and did not notice, and the record of which event it was."""

import os
import sys
import threading
from types import TracebackType

import structlog

from dovecote.consumer.attempts import Attempt, attempts_so_far, record_failures
from dovecote.consumer.time_limits import Watch, backend_pid, exceeded
from dovecote.database import Sessions
from dovecote.envelope import Envelope
from dovecote.store import deliveries, lookup
from dovecote.store.bundle import Bundle
from dovecote.telemetry.failures import describe

log = structlog.get_logger()

# How long the record may take before the process ends all the same.
_SHUTDOWN_TIMEOUT_SECONDS = 10.0
_STUCK_EXIT_CODE = 70


def end_stuck_process(sessions: Sessions, watch: Watch) -> None:
    """End this process because a handler that was cut off did not notice; first write down which."""
    error = exceeded(watch).with_traceback(_traceback_of(watch.thread_id))
    log.critical(
        "handler does not notice that it was cut off: this process ends",
        handler=watch.route.handler,
        event_id=str(watch.envelope.event_id) if watch.envelope else None,
        exc_info=error,
    )
    if watch.envelope is not None:
        # In a thread: Postgres may be away, and then the crash is counted instead (dovecote/broker/poison.py).
        record = threading.Thread(target=_record, args=(sessions, watch, watch.envelope, error), daemon=True)
        record.start()
        record.join(_SHUTDOWN_TIMEOUT_SECONDS)
    os._exit(_STUCK_EXIT_CODE)


def _record(sessions: Sessions, watch: Watch, envelope: Envelope, error: BaseException) -> None:
    pid = backend_pid(watch.session)
    with sessions() as session, session.begin():
        # Its transaction ends with its connection; a retry holds the row that is to be written.
        deliveries.end_backend(session, pid)
        # Postgres may have gone back since the handler was called.
        if lookup.look_up(session, Bundle(watch.route, [envelope])).absent:
            return
        so_far = attempts_so_far(session, watch.route, [envelope])
        attempt = Attempt(envelope, error, describe(error, envelope))
        record_failures(session, watch.route, [attempt], so_far, watch.replay)


def _traceback_of(thread_id: int) -> TracebackType | None:
    """Return where the thread is now, as if it had raised there."""
    frame = sys._current_frames().get(thread_id)
    found: TracebackType | None = None
    while frame is not None:
        found = TracebackType(found, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return found
