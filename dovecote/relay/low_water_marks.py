"""The leading relay moves the handlers' low-water marks, beside its own work and on a session of its own.

What the marks mean, and why they hold, is written beside the SQL function that moves them. Nothing here can make them
wrong: a step that is lost is only late.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import structlog

from dovecote.store.envelopes import Connection
from dovecote.store.progress import move_low_water_marks
from dovecote.unit_of_work.backoff import Backoff

log = structlog.get_logger()

_STEP_SECONDS = 1.0
# Something stays open and nothing changes, such as the backlog of a paused handler: poll less and less often.
_MAX_PAUSE_SECONDS = 15.0
_BACKOFF = Backoff(first_seconds=1.0, max_seconds=_MAX_PAUSE_SECONDS)
# Of each second, for what has fallen far behind: at most a tenth of a core for a history of millions.
_CATCHING_UP_SECONDS = 0.1

# A mark that was read must not move back when Postgres crashes. A step never waits long, nor for a standby.
_SETTINGS = "set synchronous_commit = local; set lock_timeout = '2s'; set statement_timeout = '60s'"


class LowWaterMarks:
    """Moves the marks until the end of the block. An error ends neither the block nor this: it is tried again.

    connect         opens a session for the block it is entered for
    published_upto  the highest position that this leader has published; asked from another thread
    """

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[Connection]],
        epoch: int,
        published_upto: Callable[[], int],
    ) -> None:
        self._connect = connect
        self._epoch = epoch
        self._published_upto = published_upto
        self._moved_upto: int | None = None
        self._is_open = True
        self._pause = _STEP_SECONDS
        self._next_look = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="marks", daemon=True)

    def __enter__(self) -> "LowWaterMarks":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        # A daemon: a server that does not answer keeps no relay from ending. What is under way does no harm.
        self._thread.join(2.0)

    def _run(self) -> None:
        tries = 0
        while not self._stopping.is_set():
            try:
                with self._connect() as session:
                    session.execute(_SETTINGS)
                    while not self._stopping.wait(_STEP_SECONDS if self._moved_upto is not None else 0.0):
                        self.look(session)
                        tries = 0
            except Exception as error:
                tries += 1
                if _BACKOFF.should_log(tries):
                    log.warning(
                        "the low-water marks stand still; it is tried again",
                        tries=tries,
                        error=f"{type(error).__name__}: {error}".partition("\n")[0],  # the rest is the SQL
                    )
                self._moved_upto = None
                self._stopping.wait(_BACKOFF.pause_seconds(tries))

    def look(self, session: Connection) -> None:
        """Move the marks if anything may have changed since the last time; otherwise runs no statement.

        Errors: psycopg.Error.
        """
        upto, now = self._published_upto(), time.monotonic()
        if upto == self._moved_upto and (not self._is_open or now < self._next_look):
            return
        has_moved = self._move(session, upto)
        self._pause = _STEP_SECONDS if has_moved else min(self._pause * 2, _MAX_PAUSE_SECONDS)
        self._next_look = now + self._pause
        self._moved_upto = upto

    def _move(self, session: Connection, upto: int) -> bool:
        """Return whether any mark, or what is open above it, has changed."""
        ends_at = time.monotonic() + _CATCHING_UP_SECONDS
        has_moved = False
        while True:
            step = move_low_water_marks(session, self._epoch, upto)
            self._is_open = step.is_open
            has_moved = has_moved or step.has_moved
            if not (step.is_behind and step.has_moved) or time.monotonic() > ends_at or self._stopping.is_set():
                return has_moved
