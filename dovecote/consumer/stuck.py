"""Ends a process whose handler was cut off and did not notice, and records which event it was."""

import os
import sys
import threading
from types import TracebackType

import structlog
from sqlalchemy import text

from dovecote.consumer.attempts import Attempt
from dovecote.consumer.time_limits import Watch, backend_pid, exceeded
from dovecote.database import Sessions
from dovecote.envelope import Envelope
from dovecote.store import lookup
from dovecote.store.bundle import Bundle
from dovecote.store.deliveries import Deliveries

log = structlog.get_logger()

# How long recording the event may take before the process ends all the same.
_SHUTDOWN_TIMEOUT_SECONDS = 10.0
_STUCK_EXIT_CODE = 70
# Waits until the session has ended, a few seconds at most.
_END_BACKEND = text("select pg_terminate_backend(:pid, 5000)")


def end_stuck_process(sessions: Sessions, watch: Watch) -> None:
    """Record the event of a handler that was cut off and did not notice, and end this process."""
    error = exceeded(watch).with_traceback(_traceback_of(watch.thread_id))
    log.critical(
        "handler does not notice that it was cut off: this process ends",
        handler=watch.route.handler,
        event_id=str(watch.envelope.event_id) if watch.envelope else None,
        exc_info=error,
    )
    if watch.envelope is not None:
        # In a thread: Postgres may be unavailable, and then the crash is counted instead (dovecote/store/poison.py).
        record = threading.Thread(target=_record, args=(sessions, watch, watch.envelope, error), daemon=True)
        record.start()
        record.join(_SHUTDOWN_TIMEOUT_SECONDS)
    os._exit(_STUCK_EXIT_CODE)


def _record(sessions: Sessions, watch: Watch, envelope: Envelope, error: BaseException) -> None:
    pid = backend_pid(watch.session)
    with sessions() as session, session.begin():
        # The transaction of a retry has locked the row that is to be written; it ends with its session.
        if pid is not None:
            session.execute(_END_BACKEND, {"pid": pid})
        # Postgres may have gone back since the handler was called.
        if lookup.look_up(session, Bundle(watch.route, [envelope])).absent:
            return
        deliveries = Deliveries(session, watch.route, watch.replay)
        so_far = deliveries.failed_so_far([envelope])
        deliveries.record_failures([Attempt.of(envelope, error).after(so_far[envelope.event_id], watch.route)])


def _traceback_of(thread_id: int) -> TracebackType | None:
    """Return where the thread is now, as if it had raised there."""
    frame = sys._current_frames().get(thread_id)
    found: TracebackType | None = None
    while frame is not None:
        found = TracebackType(found, frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back
    return found
