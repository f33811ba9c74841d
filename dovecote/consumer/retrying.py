"""Waiting for a server that is unavailable, until the process is asked to stop."""

import threading
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy import text

from dovecote.database import Sessions
from dovecote.errors import DovecoteError
from dovecote.store.pauses import HandlerPaused
from dovecote.telemetry.failures import is_conflict, is_transient
from dovecote.unit_of_work.backoff import Backoff

log = structlog.get_logger()

Result = TypeVar("Result")

_FIRST_PAUSE_SECONDS = 0.02
# Of a bundle. With the pauses in between they are some seconds; then a conflict is a failure like any other.
_MAX_CONFLICTS = 8
# So often may a server seem unavailable while Postgres answers. Then it is another server, which the handler uses.
_MAX_OUTAGES_ELSEWHERE = 5

_takes_writes = text("select current_setting('transaction_read_only') = 'off'")


class Stopping(DovecoteError):
    """The process was asked to stop while it waited for a server; the message is requeued."""


class Retrying:
    """Repeats work while a server is unavailable; safe to use from many threads."""

    def __init__(self, stopping: threading.Event, max_backoff_seconds: float) -> None:
        self._stopping = stopping
        self._backoff = Backoff(_FIRST_PAUSE_SECONDS, max_backoff_seconds, jitter=0.5, log_first=5)

    def retry_while_unavailable(self, work: Callable[[], Result]) -> Result:
        """Do the work, again after each error that it raises, and return what it returns.

        After any error: a failure that cannot be recorded must neither be acknowledged, which would lose it, nor
        requeued, which would bring it to the next worker at once.
        Errors: Stopping, HandlerPaused.
        """
        tries = 0
        while True:
            try:
                return work()
            except HandlerPaused:
                raise
            except Exception as error:
                tries += 1
                if self._backoff.should_log(tries) and not is_conflict(error):
                    _report(error, tries)
                if self._stopping.wait(self._backoff.pause_seconds(tries)):
                    raise Stopping from error

    def require_not_stopping(self) -> None:
        """Errors: Stopping."""
        if self._stopping.is_set():
            raise Stopping


def _report(error: Exception, tries: int) -> None:
    if is_transient(error):
        log.warning("waiting for postgres", tries=tries, error=f"{type(error).__name__}: {error}")
    else:
        log.error(
            "the outcome of an event cannot be recorded, and this does not pass by itself: its message is held",
            tries=tries,
            error=f"{type(error).__name__}: {error}",
        )


class Allowance:
    """How many errors of a bundle's transaction are no failure of its handler, and have it done once more."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._conflicts = self._outages_elsewhere = 0

    def covers(self, error: BaseException) -> bool:
        """Return whether the transaction is to be done once more after this error."""
        if is_transient(error):
            self._outages_elsewhere += self._postgres_answers()
            if self._outages_elsewhere <= _MAX_OUTAGES_ELSEWHERE:
                return True
        if is_conflict(error) and self._conflicts < _MAX_CONFLICTS:
            self._conflicts += 1
            return True
        return False

    def _postgres_answers(self) -> bool:
        try:
            with self._sessions() as session:
                return bool(session.scalar(_takes_writes))
        except Exception:
            return False
