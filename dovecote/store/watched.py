"""psycopg's connections, with a hook for a watcher of their transaction.

`connect` opens these. Without a watcher a connection has psycopg's own cursors. Calls of libpq itself, such as
`pgconn.exec_(b"commit")`, or with a cursor that is made of psycopg's classes by hand, are not seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, Self, TypeVar

import psycopg
import sqlalchemy
from psycopg.pq import TransactionStatus
from sqlalchemy.orm import Session

Row = tuple[Any, ...]
AnyCursor = TypeVar("AnyCursor", bound=psycopg.Cursor[Any])


class Watcher(Protocol):
    """Is called before things happen on a connection; what it raises prevents them."""

    def before_statement(self, query: object, parameters: object) -> None: ...
    def before_commit(self) -> None: ...
    def before_rollback(self) -> None: ...
    def before_close(self) -> None: ...
    def before_isolation_level(self) -> None: ...
    def after_error(self, error: psycopg.Error) -> None: ...


class Connection(psycopg.Connection[Row]):
    """Refuses to commit a failed transaction: Postgres would answer COMMIT with ROLLBACK, without an error."""

    watcher: Watcher | None = None

    @contextmanager
    def watched_by(self, watcher: Watcher) -> Iterator[None]:
        """Call the watcher for each statement and each end of a transaction, within the block."""
        self.watcher = watcher
        self.cursor_factory = _watched(self.cursor_factory)
        self.server_cursor_factory = _watched(self.server_cursor_factory)
        try:
            yield
        finally:
            # It may have been returned to the pool meanwhile, and be watched by another.
            if self.watcher is watcher:
                self.watcher = None

    def commit(self) -> None:
        """Commit; nothing is left open by a commit that is refused.

        Errors: InFailedSqlTransaction after an error in the transaction that was caught and passed over.
        """
        try:
            if self.watcher is not None:
                self.watcher.before_commit()
            if self.pgconn.transaction_status == TransactionStatus.INERROR:
                raise psycopg.errors.InFailedSqlTransaction(
                    "the transaction cannot be committed: a statement in it failed, and the error was caught. "
                    "What may fail goes into a savepoint: `with session.begin_nested():`"
                )
        except BaseException:
            super().rollback()
            raise
        super().commit()

    def rollback(self) -> None:
        if self.watcher is not None:
            self.watcher.before_rollback()
        super().rollback()

    def close(self) -> None:
        if self.watcher is not None:
            self.watcher.before_close()
        super().close()


def given_back(connection: psycopg.Connection[Any] | None, _record: object) -> None:
    """Leave the connection clean for its next user."""
    if isinstance(connection, Connection):
        connection.watcher = None
        # SQLAlchemy resets no connection whose transaction it takes for ended, as after a commit that failed.
        if connection.pgconn.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
            connection.rollback()


class WatchedSession(Session):
    """Raises where SQLAlchemy would only warn: a transaction that is watched has its isolation level."""

    def connection(
        self, bind_arguments: Any = None, execution_options: Mapping[str, Any] | None = None
    ) -> sqlalchemy.Connection:
        connection = super().connection(bind_arguments, execution_options)
        if execution_options and "isolation_level" in execution_options:
            driver = connection.connection.driver_connection
            if isinstance(driver, Connection) and driver.watcher is not None:
                driver.watcher.before_isolation_level()
        return connection


class _WatchedCursor(psycopg.Cursor[Row]):
    __slots__ = ()

    def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
        watcher = _watcher_of(self)
        if watcher is None:
            return super().execute(query, params, **options)
        watcher.before_statement(query, params)
        try:
            return super().execute(query, params, **options)
        except psycopg.Error as error:
            watcher.after_error(error)
            raise

    def executemany(self, query: Any, params_seq: Iterable[Any], **options: Any) -> None:
        every = list(params_seq)
        with _watching(self, query, every):
            super().executemany(query, every, **options)

    def stream(self, query: Any, params: Any = None, **options: Any) -> Iterator[Row]:
        with _watching(self, query, params):
            yield from super().stream(query, params, **options)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, **options: Any) -> Iterator[psycopg.Copy]:
        with _watching(self, statement, params), super().copy(statement, params, **options) as copy:
            yield copy


_watched_kinds: dict[type[psycopg.Cursor[Any]], type[Any]] = {}


def _watched(cursors: type[AnyCursor]) -> type[AnyCursor]:
    """Return the same kind of cursor, watched."""
    if issubclass(cursors, _WatchedCursor):
        return cursors
    if cursors not in _watched_kinds:
        _watched_kinds[cursors] = type(f"Watched{cursors.__name__}", (_WatchedCursor, cursors), {})
    return _watched_kinds[cursors]


@contextmanager
def _watching(cursor: psycopg.Cursor[Any], query: object, parameters: object) -> Iterator[None]:
    watcher = _watcher_of(cursor)
    if watcher is not None:
        watcher.before_statement(query, parameters)
    try:
        yield
    except psycopg.Error as error:
        if watcher is not None:
            watcher.after_error(error)
        raise


def _watcher_of(cursor: psycopg.Cursor[Any]) -> Watcher | None:
    connection = cursor.connection
    return connection.watcher if isinstance(connection, Connection) else None
