"""The lock of the leading relay: on the table dovecote.relay_leader, in a session of its own.

A table lock, because it requires a privilege on the table: any login can take an advisory lock. It is held by a
transaction that does nothing else and so does not hold back vacuum, while the leader works in other sessions.

The leadership ends with either session. A thread checks now and then, in the session with the lock, whether the
working session is still there. Postgres itself ends both once they have been idle for `leader_timeout_seconds`, so
that a leader which is frozen or cut off does not keep the lock, whatever login the standbys have.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Self

import psycopg
import structlog

from dovecote.errors import NewerRelay
from dovecote.processes.stop_flag import StopFlag
from dovecote.store.envelopes import Connection
from dovecote.store.foreign_locks import QUERY, foreign_locks

log = structlog.get_logger()

_CHECK_SECONDS = 0.5
# Of one try: a login without the privilege may hold the lock briefly, with a statement that is refused a little later
# (COMMENT ON VIEW). A waiting relay is next in the queue.
_TRY_MS = 100

_TAKE = "lock table dovecote.relay_leader in share update exclusive mode"
# Within a transaction the list of sessions is a snapshot, unless it is cleared.
_IS_WORKING = """
    select exists (select from pg_stat_get_activity(%s)) from (select pg_stat_clear_snapshot() offset 0) as anew
"""


class LeadershipLost(NewerRelay):
    """The session with the leader's lock has ended, or the one that the leader works in has."""


class LeaderLock:
    """The lock of one relay, which works on `working`. A context manager: the lock is released at its end.

    connect  opens a session with autocommit, like `working`
    """

    def __init__(
        self,
        connect: Callable[[], AbstractContextManager[Connection]],
        working: Connection,
        stop: StopFlag,
        leader_timeout_seconds: float,
    ) -> None:
        self._connect = connect
        self._working = working
        self._stop = stop
        self._frozen_after = leader_timeout_seconds
        self._open = ExitStack()
        self._lost: str | None = None
        self._logged: set[str] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._session = self._open.enter_context(self._connect())
        timeout_ms = round(self._frozen_after * 1_000)
        self._session.execute(f"set application_name = 'dovecote relay lock'; set lock_timeout = {_TRY_MS}")
        self._session.execute(f"set idle_in_transaction_session_timeout = {timeout_ms}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._session.close()  # not committed: whatever the transaction is in, the lock goes with the session
        self._open.close()

    def try_take(self) -> bool:
        """Take the lock if it is free.

        Errors: psycopg.Error, such as InsufficientPrivilege without the rights of dovecote_worker.
        """
        self._session.execute("begin")
        try:
            self._session.execute(_TAKE)
        except psycopg.errors.LockNotAvailable:
            self._session.execute("rollback")
            return False
        return True

    def give_back(self) -> None:
        """Release what `try_take` has taken."""
        self._session.execute("rollback")

    def begin(self) -> None:
        """Watch both sessions from now on: the leader runs a statement in `working` every second."""
        self._working.execute(f"set idle_session_timeout = {round(self._frozen_after * 1_000)}")
        self._thread = threading.Thread(target=self._watch, name="leadership", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Errors: LeadershipLost."""
        if self._lost is not None:
            raise LeadershipLost(self._lost)

    def log_foreign_locks(self) -> None:
        """Log, once each, the foreign holders of our advisory locks."""
        found = {str(lock): lock for lock in foreign_locks(self._working.execute(QUERY))}
        for name in found.keys() - self._logged:
            log.error("a foreign session holds locks of ours", holder=name, cure=found[name].cure)
        self._logged = set(found)

    def _watch(self) -> None:
        working = self._working.info.backend_pid
        while not self._stopped.wait(_CHECK_SECONDS):
            try:
                (is_there,) = self._session.execute(_IS_WORKING, (working,)).fetchone() or (False,)
                why = None if is_there else f"the session the leader works in (backend {working}) is over"
            except psycopg.Error as error:
                why = f"the session that holds the leader's lock is over: {error}"
            if why is not None:
                self._lost = why
                self._session.close()
                self._stop.interrupt()
                return
