"""Requires that the effect of a handler commits with the transaction that records its event as processed.

Looked at after each call of a handler, without a question to the server: the session knows which transaction it is in,
and libpq in what state the connection was left. Ends of the transaction are refused before they happen, whatever the
way: a method, SQL, one of several statements in a text. So are settings that would hold for the bundle's other events;
they are compared, but only once a handler has said SET, RESET, DO, CALL or set_config().

Not seen: a function in the database that sets something by itself without a SET clause; what is said to libpq's own
connection (`pgconn.exec_`), or with a cursor that is made of psycopg's classes by hand, and everything on an engine
that `connect` has not made. Their ends of a transaction are noticed after the call, unless they begin another at once.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row
from sqlalchemy.orm import Session

from dovecote.consumer.statements import statements_in
from dovecote.errors import DovecoteError
from dovecote.store.connections import driver_connection
from dovecote.store.watched import Connection

_SAVEPOINT = "put what may fail into a savepoint: `with uow.session.begin_nested():`"
_NO_END = (
    "its effect and the record of its event commit together when it returns; "
    f"to undo a part, {_SAVEPOINT}, and to give up, raise"
)
_PUT_BACK = "put it back before returning, or set it in a function with a SET clause"

_IN_TRANSACTION = TransactionStatus.INTRANS.value
_STATES = {
    TransactionStatus.IDLE: f"ended its transaction: {_NO_END}",
    TransactionStatus.ACTIVE: "left a statement unfinished: read its result to the end, or close it",
    TransactionStatus.INERROR: f"caught an error of the database and went on: {_SAVEPOINT}",
}

# `role` and `session_authorization` are in no view, and neither are custom settings, such as `app.tenant`.
_SETTINGS = """
    select name, setting from pg_catalog.pg_settings where context in ('user', 'superuser')
    union all
    select name, pg_catalog.current_setting(name, true)
    from pg_catalog.unnest(array['role', 'session_authorization'] || %s::text[]) as named (name)
"""
_CUSTOM_NAME = re.compile(r"(?<![\w$])[^\W\d][\w$]*(?:\.[^\W\d][\w$]*)+")
_MAX_CUSTOM_NAMES = 100


class EndedTransaction(DovecoteError):
    """A handler ended the transaction it was given, broke it, or changed it for the events after its own."""


class TransactionGuard:
    """Guards the transaction of one bundle while its handler is called, in the thread that calls it."""

    def __init__(self, session: Session, handler: str) -> None:
        self._session = session
        self._handler = handler
        self._transaction = session.get_transaction()
        self._driver = driver_connection(session)
        # Those of this call that are there, and those of them that it has neither released nor rolled back to.
        self._savepoints: list[str] = []
        self._open_savepoints: list[str] = []
        self._settings: dict[str, str] = {}
        #: What the handler did, also if it has caught what was raised then.
        self._violation: str | None = None
        #: The first error that the database answered during this call.
        self._error: psycopg.Error | None = None

    @contextmanager
    def on_watch(self) -> Iterator[None]:
        """Have the connection report what is done to it; one that `connect` has not opened reports nothing."""
        with self._driver.watched_by(self) if isinstance(self._driver, Connection) else nullcontext():
            yield

    def check(self) -> None:
        """Say after a call of the handler that its transaction is whole.

        Errors: EndedTransaction. Its cause is the error of the database that the handler passed over, if any: one
        that says that a server is away, or that another transaction was in the way, stays what it is.
        """
        transaction = self._transaction
        if (
            self._violation is None
            and transaction is not None
            and transaction.is_active
            and self._session.get_transaction() is transaction
            and not self._session.in_nested_transaction()
            and self._driver.pgconn.transaction_status == _IN_TRANSACTION
            and not self._open_savepoints
            and not self._settings
        ):
            self._error = None
        else:
            self._judge()
        self._savepoints.clear()

    def can_roll_back(self) -> bool:
        """Return whether the connection is there and at rest; an open stream holds its lock."""
        return self._driver.pgconn.transaction_status not in (TransactionStatus.ACTIVE, TransactionStatus.UNKNOWN)

    def _judge(self) -> None:
        status = self._driver.pgconn.transaction_status
        if self._violation is not None:
            self._fail(self._violation)
        if status == TransactionStatus.UNKNOWN:
            self._error = self._error or psycopg.OperationalError("the connection is lost")
            self._fail("lost its connection to the database and went on")
        if status != TransactionStatus.INTRANS:
            self._fail(_STATES[TransactionStatus(status)])
        if self._session.get_transaction() is not self._transaction:
            self._fail(f"ended its session's transaction: {_NO_END}")
        if self._session.in_nested_transaction() or self._open_savepoints:
            self._fail("left a savepoint open: release it or roll it back, as the `with` block of begin_nested() does")
        if self._transaction is None or not self._transaction.is_active:
            self._fail(f"left a session that a failed flush has ended: {_SAVEPOINT}")
        self._compare_settings()
        self._error = None

    def _fail(self, what: str) -> NoReturn:
        raise EndedTransaction(f"{self._handler} {what}") from self._error

    def _refuse(self, what: str) -> NoReturn:
        self._violation = self._violation or what
        raise EndedTransaction(f"{self._handler} {what}")

    # What the connection reports -----------------------------------------------------------------

    def before_statement(self, query: object, parameters: object) -> None:
        """Errors: EndedTransaction."""
        text = query if isinstance(query, str) else _text(query, self._driver)
        for statement in statements_in(text):
            match statement.kind:
                case "commit" | "rollback" | "begin":
                    self._refuse(f"said `{statement.words}` in SQL: {_NO_END}")
                case "savepoint":
                    self._savepoints.append(statement.name)
                    self._open_savepoints.append(statement.name)
                case "release":
                    self._leave(statement.name)
                case "rollback to":
                    if statement.name not in self._savepoints:
                        self._refuse(f"rolled back to the savepoint {statement.name!r}, which is not its own")
                    self._leave(statement.name)
                    self._savepoints.append(statement.name)  # it is still there, and may be rolled back to again
                case "set":
                    self._keep_settings(_custom_names(text, parameters))

    def before_commit(self) -> None:
        """Errors: EndedTransaction."""
        self._refuse(f"committed: {_NO_END}")

    def before_rollback(self) -> None:
        caught = self._driver.pgconn.transaction_status == TransactionStatus.INERROR
        self._violation = self._violation or (
            f"caught an error of the database and rolled back, and with it the other events of its bundle: {_SAVEPOINT}"
            if caught
            else f"rolled back: {_NO_END}"
        )

    def before_close(self) -> None:
        self._violation = self._violation or f"closed its connection: {_NO_END}"

    def before_isolation_level(self) -> None:
        """Errors: EndedTransaction."""
        self._refuse(
            "asked for another isolation level, which a transaction that has begun cannot get: "
            "open a session of its own for that"
        )

    def after_error(self, error: psycopg.Error) -> None:
        self._error = self._error or error

    # Savepoints and settings ---------------------------------------------------------------------

    def _leave(self, name: str) -> None:
        """Forget the savepoint, and those inside it."""
        for savepoints in (self._savepoints, self._open_savepoints):
            if name in savepoints:
                while savepoints.pop() != name:
                    pass

    def _keep_settings(self, custom: Sequence[str]) -> None:
        """Remember how everything is set, before it is set."""
        if not self._settings:
            self._settings = self._current_settings(custom)
        elif new := [name for name in custom if name not in self._settings]:
            now = self._current_settings(new)
            self._settings.update({name: now[name] for name in new})

    def _compare_settings(self) -> None:
        before, self._settings = self._settings, {}
        if not before:
            return
        now = self._current_settings([name for name in before if "." in name])
        changed = [name for name, setting in before.items() if now.get(name) != setting]
        if changed:
            # Another role may see less: then it is the role that has changed.
            names = ", ".join([name for name in ("session_authorization", "role") if name in changed] or changed[:5])
            self._fail(f"left {names} set, which would hold for the other events of its bundle: {_PUT_BACK}")

    def _current_settings(self, custom: Sequence[str]) -> dict[str, str]:
        with psycopg.Cursor(self._driver, row_factory=tuple_row) as cursor:
            found = cursor.execute(_SETTINGS, [list(custom)])
            # A custom setting that was never set is null, and empty once it was.
            return {name: setting or "" for name, setting in found}


def _text(query: object, connection: psycopg.Connection[Any]) -> str:
    if isinstance(query, bytes):
        return query.decode("utf-8", "replace")
    if isinstance(query, sql.Composable):
        return query.as_string(connection)
    return sql.as_string(query, connection) if hasattr(sql, "as_string") else ""  # a t-string; psycopg 3.3 and later


def _custom_names(text: str, parameters: object) -> list[str]:
    names = {name.lower(): None for part in (text, *_texts(parameters)) for name in _CUSTOM_NAME.findall(part)}
    return list(names)[:_MAX_CUSTOM_NAMES]


def _texts(parameters: object) -> Iterator[str]:
    if isinstance(parameters, str):
        yield parameters
    elif isinstance(parameters, Mapping):
        yield from _texts(list(parameters.values()))
    elif isinstance(parameters, Iterable) and not isinstance(parameters, bytes):
        for parameter in parameters:
            yield from _texts(parameter)
