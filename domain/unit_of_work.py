"""One transaction: its session, the facts it tells, and the events it acts on once.

A service opens its own with `unit_of_work(sessions)`, or puts `UnitOfWork(session)` around a
transaction it already has, sync or async. Where transactions get in each other's way, it hands its story to
`run_unit_of_work`, which tells it again. Emitted events are written when that transaction commits,
after the state they tell of, so that an aggregate's row is locked before its event gets a position.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import UUID

from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.exc import StaleDataError

from domain import outbox, processed_events
from domain.database import Sessions
from domain.errors import ConcurrentChange
from domain.events import Event
from domain.privacy import Keyring

_inject: Callable[[dict[str, str]], None] | None
try:  # a service that traces has it; one that does not needs none
    from opentelemetry.propagate import inject as _inject
except ImportError:
    _inject = None


class HasEventId(Protocol):
    @property
    def event_id(self) -> UUID: ...


AnyEvent = TypeVar("AnyEvent", bound=HasEventId)
Result = TypeVar("Result")

# serialization_failure and deadlock_detected; Postgres has rolled back, also when they come at the commit
_CONFLICTS = ("40001", "40P01")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.01, 0.5


class UnitOfWork:
    """A transaction that tells what it does.

    `headers` travel with every event it emits; the trace context of the caller is added by itself
    when OpenTelemetry is installed. `keys` seal the sensitive fields of those that have any.
    """

    def __init__(
        self,
        session: Session | AsyncSession,
        headers: Mapping[str, str] | None = None,
        keys: Keyring | None = None,
    ) -> None:
        # The facts wait in the sync session that an AsyncSession wraps; its commit runs our listener
        # inside SQLAlchemy's greenlet, so the same code serves both.
        self.session: Session = session.sync_session if isinstance(session, AsyncSession) else session
        self._headers = dict(headers or {})
        self._keys = keys

    def emit(self, event: Event) -> None:
        """Write the fact with this transaction: both commit or neither does.

        Errors: InvalidEvent at once when the outbox would refuse it.
        """
        row = outbox.row_for(event, {**_trace_headers(), **self._headers}, self._keys)
        _Facts.of(self.session).add(self.session, row)

    def once(self, handler_name: str, events: Sequence[AnyEvent]) -> list[AnyEvent]:
        """Return the events that `handler_name` has not acted on before, and record that it does now."""
        different = _once_each(events)
        known = processed_events.mark(self.session, handler_name, different)
        return [event for event_id, event in different.items() if event_id not in known]

    def again(
        self, handler_name: str, events: Sequence[AnyEvent], replay_id: UUID, *, as_retry: bool = False
    ) -> list[AnyEvent]:
        """Return the events that `handler_name` has acted on, but not for this replay yet, and record that it does.

        `as_retry`: they failed in the replay, which may be done by now.
        """
        different = _once_each(events)
        fresh = processed_events.mark_again(self.session, handler_name, different, replay_id, as_retry=as_retry)
        return [event for event_id, event in different.items() if event_id in fresh]


def _once_each(events: Sequence[AnyEvent]) -> dict[UUID, AnyEvent]:
    """An event twice in one bundle is new once."""
    return {event.event_id: event for event in events}


@contextmanager
def unit_of_work(
    sessions: Sessions, headers: Mapping[str, str] | None = None, keys: Keyring | None = None
) -> Iterator[UnitOfWork]:
    """Open a transaction; commit it at the end of the block, roll it back if the block raises.

    Errors: ConcurrentChange when an aggregate was changed by somebody else since it was loaded.
    """
    with sessions() as session:
        try:
            with session.begin():
                yield UnitOfWork(session, headers, keys)
        except StaleDataError as error:
            raise ConcurrentChange(str(error)) from error


def run_unit_of_work(
    sessions: Sessions,
    work: Callable[[UnitOfWork], Result],
    headers: Mapping[str, str] | None = None,
    keys: Keyring | None = None,
    *,
    tries: int = 5,
) -> Result:
    """Do the work in a transaction of its own and return what it returns.

    When another transaction was in the way (a serialization failure, a deadlock, an aggregate that somebody
    else changed), the work is done again from its start, in a new transaction, after a short jittered pause:
    at most `tries` times, within about a second. What `work` does beyond its transaction it does each time.
    Nothing else is tried again; after a commit without a reply, nobody knows whether it happened.
    Errors: the last conflict, and whatever the work raises.
    """
    for pause_seconds in _pauses(tries):
        try:
            with unit_of_work(sessions, headers, keys) as uow:
                return work(uow)
        except Exception as error:
            if not is_conflict(error):
                raise
        time.sleep(pause_seconds)
    with unit_of_work(sessions, headers, keys) as uow:
        return work(uow)


async def run_unit_of_work_async(
    sessions: "async_sessionmaker[AsyncSession]",
    work: Callable[[UnitOfWork, AsyncSession], Awaitable[Result]],
    headers: Mapping[str, str] | None = None,
    keys: Keyring | None = None,
    *,
    tries: int = 5,
) -> Result:
    """Like `run_unit_of_work`. The work may await its AsyncSession, and run a service's story in it:
    `await session.run_sync(lambda _: start_membership(uow, ...))`.
    """

    async def once() -> Result:
        async with sessions() as session:
            try:
                async with session.begin():
                    return await work(UnitOfWork(session, headers, keys), session)
            except StaleDataError as error:
                raise ConcurrentChange(str(error)) from error

    for pause_seconds in _pauses(tries):
        try:
            return await once()
        except Exception as error:
            if not is_conflict(error):
                raise
        await asyncio.sleep(pause_seconds)
    return await once()


def is_conflict(error: BaseException) -> bool:
    """Return whether the error says that another transaction was in the way, and that this one left nothing behind."""
    # The driver's own error knows: psycopg's, or asyncpg's below an AsyncSession.
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, ConcurrentChange) or getattr(cause, "sqlstate", None) in _CONFLICTS


def _pauses(tries: int) -> Iterator[float]:
    """Yield the pause after each try but the last: doubling, half of it jitter."""
    for earlier in range(tries - 1):
        yield min(_FIRST_PAUSE_SECONDS * 2**earlier, _LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1.0)


@dataclass
class _Fact:
    row: dict[str, Any]
    emitted_in: SessionTransaction | None  # the savepoint at hand, None outside of any
    written_in: SessionTransaction | None = None
    written: bool = False


class _Facts:
    """The facts of one session's transaction, and how far each has got.

    A savepoint that is rolled back takes along what was emitted inside it; what was emitted before it
    but written inside it is written again.
    """

    KEY = "dovecote.facts"

    def __init__(self) -> None:
        self._facts: list[_Fact] = []

    @classmethod
    def of(cls, session: Session) -> "_Facts":
        facts: _Facts | None = session.info.get(cls.KEY)
        if facts is None:
            facts = session.info[cls.KEY] = cls()
        return facts

    def add(self, session: Session, row: dict[str, Any]) -> None:
        if not session.in_transaction():
            session.begin()  # as any statement would; without one, close() and rollback() end nothing
        self._facts.append(_Fact(row, emitted_in=session.get_nested_transaction()))

    def write(self, session: Session) -> None:
        waiting = [fact for fact in self._facts if not fact.written]
        if not waiting:
            return
        # State first: the aggregate's row is locked before its event gets a position, which is what
        # keeps the events of one aggregate in order.
        session.flush()
        outbox.append(session, [fact.row for fact in waiting])
        for fact in waiting:
            fact.written, fact.written_in = True, session.get_nested_transaction()

    def undo(self, rolled_back: SessionTransaction) -> None:
        self._facts = [fact for fact in self._facts if not _within(fact.emitted_in, rolled_back)]
        for fact in self._facts:
            if _within(fact.written_in, rolled_back):
                fact.written, fact.written_in = False, None

    def end(self, transaction: SessionTransaction) -> None:
        # Also after close() without commit, which calls no rollback hook.
        if transaction.parent is None:
            self._facts.clear()


# On every session there is: to listen to each anew costs a transaction more than writing its event.
@listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    if facts := session.info.get(_Facts.KEY):
        facts.write(session)


@listens_for(Session, "after_soft_rollback")
def _after_soft_rollback(session: Session, rolled_back: SessionTransaction) -> None:
    if facts := session.info.get(_Facts.KEY):
        facts.undo(rolled_back)


@listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if facts := session.info.get(_Facts.KEY):
        facts.end(transaction)


def _within(inner: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while inner is not None and inner is not outer:
        inner = inner.parent
    return inner is outer


def _trace_headers() -> dict[str, str]:
    headers: dict[str, str] = {}
    if _inject is not None:
        _inject(headers)
    return headers
