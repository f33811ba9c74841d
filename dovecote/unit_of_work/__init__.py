"""One transaction: its session, the events it emits, and the events it handles once.

A service opens its own with `unit_of_work(sessions)`, or puts `UnitOfWork(session)` around a
transaction it already has, sync or async. Where transactions conflict, it passes its use case to
`run_unit_of_work`, which runs it again. Emitted events are written when that transaction commits,
after the state they describe, so that an aggregate's row is locked before its event gets a position
(dovecote/unit_of_work/emitting.py).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar
from uuid import UUID

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.exc import StaleDataError

from dovecote import outbox, processed_events
from dovecote.database import Sessions
from dovecote.errors import ConcurrentChange, NoTransaction
from dovecote.events import Event
from dovecote.privacy import Keyring
from dovecote.unit_of_work.backoff import Backoff
from dovecote.unit_of_work.emitting import Emitted, refuse_aborted
from dovecote.unit_of_work.trace_headers import trace_headers


class HasEventId(Protocol):
    @property
    def event_id(self) -> UUID: ...


AnyEvent = TypeVar("AnyEvent", bound=HasEventId)
Result = TypeVar("Result")

# serialization_failure and deadlock_detected; Postgres has rolled back, also when they come at the commit
_CONFLICTS = ("40001", "40P01")
_BACKOFF = Backoff(first_seconds=0.01, max_seconds=0.5, jitter=0.5)


class UnitOfWork:
    """A transaction that emits events.

    `session`: what a service has open, sync or async; a scoped one stands for the session of this thread or task.
    `headers` travel with every event it emits; the trace context of the caller (`traceparent`, `tracestate`) is added
    when OpenTelemetry is installed. `keys` encrypt sensitive fields.
    Errors: TypeError for anything that is no session.
    """

    def __init__(
        self,
        session: Session | AsyncSession | scoped_session[Session] | async_scoped_session[AsyncSession],
        headers: Mapping[str, str] | None = None,
        keys: Keyring | None = None,
    ) -> None:
        self.session: Session = _session_of(session)
        self._headers = dict(headers or {})
        self._keys = keys
        self._block_has_ended = False  # of a unit of work that opened its transaction itself

    def emit(self, event: Event) -> None:
        """Write the event with this transaction: both commit or neither does.

        Errors: InvalidEvent at once when the outbox would refuse it; NoTransaction when nothing would write it: after
        the commit, in a transaction that was rolled back, after the block of `unit_of_work`.
        """
        if self._block_has_ended:
            raise NoTransaction(
                f"{event.type} {event.event_id}: emitted after the block of its unit of work has ended, where nothing "
                "would write it; emit inside of the block"
            )
        row = outbox.row_for(event, self._headers, self._keys, trace_headers())
        Emitted.of(self.session).add(self.session, row)

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


def _session_of(session: object) -> Session:
    if isinstance(session, scoped_session | async_scoped_session):
        session = session()
    if isinstance(session, AsyncSession):
        # Its commit runs our listeners inside SQLAlchemy's greenlet, so the same code serves both.
        return session.sync_session
    if isinstance(session, Session):
        return session
    if isinstance(session, Connection | AsyncConnection):
        cure = f"open a session on it ({'Async' * isinstance(session, AsyncConnection)}Session(bind=connection))"
    elif callable(session):
        cure = "call it, and pass on what it returns"
    else:
        cure = "without SQLAlchemy's ORM, write the event in SQL: select dovecote.append_event(...)"
    raise TypeError(
        f"UnitOfWork takes a Session, an AsyncSession or a scoped one of these, got {_kind(session)}; {cure}"
    )


def _kind(value: object) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


def _once_each(events: Sequence[AnyEvent]) -> dict[UUID, AnyEvent]:
    """An event twice in one bundle is new once."""
    return {event.event_id: event for event in events}


@contextmanager
def unit_of_work(
    sessions: Sessions, headers: Mapping[str, str] | None = None, keys: Keyring | None = None
) -> Iterator[UnitOfWork]:
    """Open a transaction; commit it at the end of the block, roll it back if the block raises.

    Errors: ConcurrentChange when an aggregate was changed by somebody else since it was loaded; AbortedTransaction
    when the block caught an error of the database, which has rolled everything back.
    """
    with sessions() as session:
        uow = UnitOfWork(session, headers, keys)
        try:
            with session.begin():
                yield uow
                refuse_aborted(session)
        except StaleDataError as error:
            raise ConcurrentChange(str(error)) from error
        finally:
            uow._block_has_ended = True


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
    Nothing else is tried again; after a commit without a reply, it is not known whether it happened.
    Errors: the last conflict, and whatever the work raises.
    """
    for earlier in range(1, tries):
        try:
            with unit_of_work(sessions, headers, keys) as uow:
                return work(uow)
        except Exception as error:
            if not is_conflict(error):
                raise
        time.sleep(_BACKOFF.pause_seconds(earlier))  # the other transaction ends meanwhile
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
    """Like `run_unit_of_work`. The work may await its AsyncSession, and run a use case in it:
    `await session.run_sync(lambda _: start_membership(uow, ...))`.
    """

    async def once() -> Result:
        async with sessions() as session:
            uow = UnitOfWork(session, headers, keys)
            try:
                async with session.begin():
                    result = await work(uow, session)
                    refuse_aborted(session.sync_session)
                    return result
            except StaleDataError as error:
                raise ConcurrentChange(str(error)) from error
            finally:
                uow._block_has_ended = True

    for earlier in range(1, tries):
        try:
            return await once()
        except Exception as error:
            if not is_conflict(error):
                raise
        await asyncio.sleep(_BACKOFF.pause_seconds(earlier))
    return await once()


def is_conflict(error: BaseException) -> bool:
    """Return whether the error says that another transaction was in the way, and that this one left nothing behind."""
    # The driver's own error knows: psycopg's, or asyncpg's below an AsyncSession.
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, ConcurrentChange) or getattr(cause, "sqlstate", None) in _CONFLICTS
