"""The events of one session's transaction, on their way from `emit` to the outbox.

They wait in memory until the session commits: a `before_commit` listener flushes the state, which locks the rows, and
then writes all events with one statement. What is emitted later than that, in hooks of the commit itself, is written
by a listener on the Connection at its COMMIT, which is the last chance. The same listener serves a session on a
Connection that it was given, whose owner may commit without the session.

Nothing is lost silently: what a commit did not write raises, and what a closed session drops is warned of.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.event import listens_for
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, SessionTransaction

from dovecote import outbox
from dovecote.errors import AbortedTransaction, EventsDropped, EventsNotWritten, NoTransaction

# Not in session.info: that belongs to the service, which may clear it.
_KEY = "_dovecote_emitted"
# SQLAlchemy's code of the one state that is not active and yet no end: the session is just getting its connection.
_PROVISIONING = "isce"
# libpq's PQTRANS_INERROR, as psycopg and psycopg2 return it.
_IN_ERROR = 3


@dataclass(slots=True)
class _Waiting:
    row: dict[str, Any]
    emitted_in: SessionTransaction | None  # the savepoint at hand, None outside of any


class Emitted:
    """The events of a session's transaction that wait to be written.

    A savepoint that ends without a commit takes along what was emitted inside it.
    """

    __slots__ = ("_at_commit", "_committed", "_committing", "_is_over", "_rolled_back", "_waiting")

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        # Commits that have begun: of the transaction, and of savepoints. In each, `before_commit` has run.
        self._committing = 0
        self._committed: SessionTransaction | None = None  # about to end
        self._rolled_back = False
        self._is_over = False  # the last transaction ended with a commit, and none has begun since
        self._at_commit: _AtCommit | None = None

    @classmethod
    def of(cls, session: Session) -> "Emitted":
        emitted: Emitted | None = session.__dict__.get(_KEY)
        if emitted is None:
            emitted = session.__dict__[_KEY] = cls()
        return emitted

    def __del__(self) -> None:
        # The session was neither committed nor closed: the garbage collector ends its transaction.
        if self._waiting:
            _warn_of_dropped(self._waiting)

    def add(self, session: Session, row: dict[str, Any]) -> None:
        """Keep a row for the commit. Errors: NoTransaction."""
        if session.get_transaction() is None:
            self._begin(session, row)
        elif not session.is_active:
            _refuse_inactive(session, row)
        if self._committing or isinstance(session.bind, Connection):
            self._write_at_commit(session)
        self._waiting.append(_Waiting(row, emitted_in=session.get_nested_transaction()))

    def _begin(self, session: Session, row: dict[str, Any]) -> None:
        if self._is_over:
            raise NoTransaction(
                f"{_named(row)}: emitted after the commit, outside of any transaction, where nothing would write it; "
                "emit before the commit, or begin the next transaction first (session.begin())"
            )
        if not session.autobegin:
            raise NoTransaction(
                f"{_named(row)}: emitted outside of any transaction, and the session begins none automatically "
                "(autobegin=False); call session.begin() first"
            )
        try:
            session.begin()  # as any statement would; without one, close() and rollback() end nothing
        except InvalidRequestError as error:
            raise NoTransaction(f"{_named(row)}: the session can begin no transaction for it: {error}") from error

    def before_commit(self, session: Session) -> None:
        if self._waiting:
            refuse_aborted(session)
            if session.in_nested_transaction():
                # The commit of a savepoint, perhaps inside of a flush; or of the transaction, with one left open.
                self._write_at_commit(session)
            else:
                # State first: the aggregate's row is locked before its event gets a position, which is what
                # keeps the events of one aggregate in order. The flush's own hooks may emit more.
                session.flush()
                self.write(session.connection())
        self._committing += 1

    def _write_at_commit(self, session: Session) -> None:
        if self._at_commit is None:
            if isinstance(session.bind, Connection):
                self._at_commit = _AtCommit(self, session, session.bind, is_ours=False)
            else:
                self._at_commit = _AtCommit(self, session, _connection(session), is_ours=True)

    def after_commit(self, session: Session) -> None:
        self._committing -= 1
        self._committed = session.get_nested_transaction() or session.get_transaction()

    def after_rollback(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self._rolled_back = True

    def write(self, connection: Connection) -> None:
        if self._waiting:
            rows = [waiting.row for waiting in self._waiting]
            outbox.append(connection, rows)
            del self._waiting[: len(rows)]  # a hook of the statement may emit as well

    def drop(self) -> list[_Waiting]:
        dropped, self._waiting = self._waiting, []
        return dropped

    def end(self, transaction: SessionTransaction) -> None:
        is_committed = transaction is self._committed
        self._committed = None
        if transaction.parent is not None:
            if not is_committed:  # rolled back, or closed, which calls no rollback hook
                self._waiting = [one for one in self._waiting if not _within(one.emitted_in, transaction)]
            return

        at_commit, self._at_commit = self._at_commit, None
        if at_commit is not None:
            at_commit.end(transaction)
        was_rolled_back = self._rolled_back
        self._committing, self._rolled_back, self._is_over = 0, False, is_committed
        left = self.drop()
        if left and is_committed:
            raise EventsNotWritten(
                f"the transaction is committed without {_listed(left)}, emitted in it: something kept Dovecote's "
                "listeners from writing. Emit again in a new transaction"
            )
        if left and not was_rolled_back:
            _warn_of_dropped(left)


class _AtCommit:
    """Writes what waits when a Connection commits.

    On the session's own Connection (`is_ours`) it is what was emitted during the commit, or inside of savepoints. On a
    Connection that the session was given, others decide: their savepoints are its boundaries as well, so that Postgres
    itself undoes what was written inside one that is rolled back.

    Made only where it is needed: to listen to each Connection anew costs a transaction 2 % of its time.
    """

    def __init__(self, emitted: Emitted, session: Session, connection: Connection, *, is_ours: bool) -> None:
        self._emitted, self._session, self._connection = emitted, session, connection
        self._listeners: dict[str, Callable[..., None]] = {"commit": self._commit, "prepare_twophase": self._prepare}
        if not is_ours:
            self._listeners |= {
                "commit_twophase": self._commit_twophase,
                "savepoint": self._savepoint,
                "release_savepoint": self._savepoint,
                "rollback": self._rollback,
                "rollback_savepoint": self._rollback_savepoint,
            }
        for name, listener in self._listeners.items():
            event.listen(connection, name, listener)

    def end(self, transaction: SessionTransaction) -> None:
        """The session's transaction has ended. Where the Connection's goes on with its state, its events go along."""
        for name, listener in self._listeners.items():
            event.remove(self._connection, name, listener)
        if self._connection in transaction.connections and self._connection.in_transaction():
            self._emitted.write(self._connection)

    def _commit(self, connection: Connection) -> None:
        try:
            self._write()
        except BaseException:
            # SQLAlchemy takes a transaction for ended whose commit has failed: it would go back to the pool as it is.
            connection.dialect.do_rollback(connection.connection)
            raise

    def _prepare(self, _connection: Connection, _xid: Any) -> None:
        self._write()

    def _commit_twophase(self, connection: Connection, _xid: Any, is_prepared: bool) -> None:
        if not is_prepared:
            self._commit(connection)

    def _savepoint(self, _connection: Connection, _name: str, _context: Any = None) -> None:
        session = self._session
        # Savepoints of the session do not count: it reports its commits itself, and while it begins it may make one
        # that is its whole transaction.
        if not session.in_nested_transaction() and (session.is_active or _why_inactive(session)):
            self._write()

    def _rollback(self, _connection: Connection) -> None:
        self._drop()

    def _rollback_savepoint(self, _connection: Connection, _name: str, _context: Any) -> None:
        if not self._session.in_nested_transaction():
            self._drop()

    def _write(self) -> None:
        if self._session.in_transaction() and self._session.is_active:
            self._session.flush()  # not where the session itself commits: it has flushed
        self._emitted.write(self._connection)

    def _drop(self) -> None:
        dropped = self._emitted.drop()
        if dropped and not self._session.in_transaction():
            _warn_of_dropped(dropped)  # it is session.close() that rolls back


def refuse_aborted(session: Session) -> None:
    """Refuse to commit what Postgres has rolled back. Errors: AbortedTransaction. No round trip.

    After an error Postgres answers COMMIT with ROLLBACK, and neither the driver nor SQLAlchemy says so.
    """
    transaction = session.get_transaction()
    if transaction is None:
        return
    cause = _why_inactive(session)
    if cause is not None or any(map(_is_aborted, transaction.connections)):
        raise AbortedTransaction(
            "a database error was caught inside of the transaction, which Postgres has rolled back because of it: "
            "nothing is committed. Put what may fail into a savepoint (with uow.session.begin_nested(): ...) and catch "
            "its error outside of that"
        ) from cause


def _is_aborted(connection: Connection) -> bool:
    # psycopg and psycopg2 know it from the last reply; asyncpg has nothing like it.
    info = getattr(connection.connection.driver_connection, "info", None)
    return getattr(info, "transaction_status", None) == _IN_ERROR


def _refuse_inactive(session: Session, row: dict[str, Any]) -> None:
    if error := _why_inactive(session):
        raise NoTransaction(
            f"{_named(row)}: emitted in a transaction that has ended, by its commit, its roll-back or a failed flush, "
            "where nothing would write it; emit before the commit, or in the next transaction"
        ) from error


def _why_inactive(session: Session) -> InvalidRequestError | None:
    """Return what SQLAlchemy says of a transaction that is not active; None while it only gets its connection."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is not None and not transaction.is_active:
        try:
            transaction.connection(None)
        except InvalidRequestError as error:
            return None if error.code == _PROVISIONING else error
    return None


def _connection(session: Session) -> Connection:
    transaction = session.get_transaction()
    assert transaction is not None
    try:
        return transaction.bound_connection()  # in an after_begin hook, session.connection() does not give it yet
    except InvalidRequestError:
        return session.connection()


def _within(inner: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while inner is not None and inner is not outer:
        inner = inner.parent
    return inner is outer


def _named(row: dict[str, Any]) -> str:
    return f"{row['event_type']} {row['id']}"


def _listed(events: Sequence[_Waiting]) -> str:
    names = [_named(waiting.row) for waiting in events[:3]]
    if len(events) > len(names):
        names.append(f"{len(events) - len(names)} more")
    return f"{len(events)} event{'s'[: len(events) > 1]} ({', '.join(names)})"


def _warn_of_dropped(events: Sequence[_Waiting]) -> None:
    # The handler of an exception knows that nothing was committed.
    if sys.exc_info()[1] is None:
        warnings.warn(
            f"a session was closed without a commit and drops {_listed(events)} with its transaction",
            EventsDropped,
            stacklevel=2,
        )


# On every session there is: to listen to each anew costs a transaction more than writing its event.
@listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    Emitted.of(session).before_commit(session)


@listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    Emitted.of(session).after_commit(session)


@listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    Emitted.of(session).after_rollback(session)


@listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None or transaction.nested:  # not one of a flush
        Emitted.of(session).end(transaction)
