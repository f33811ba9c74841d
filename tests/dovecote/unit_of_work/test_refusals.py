"""An event that nothing would write is refused where it is emitted; one that is dropped is reported."""

import asyncio
import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest
import sqlalchemy.exc
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from dovecote.errors import AbortedTransaction, EventsDropped, EventsNotWritten, NoTransaction
from dovecote.unit_of_work import UnitOfWork, emitting, run_unit_of_work, run_unit_of_work_async, unit_of_work
from tests.support.quotes import a_quote
from tests.support.rows import Row, Transact, emit, state, written

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("error::dovecote.errors.EventsDropped")]

# Refused at the call ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["after_commit", "after_rollback"])
def test_an_event_of_a_hook_after_the_end_is_refused(engine: Engine, theirs: sessionmaker[Session], hook: str) -> None:
    refusals = []

    def emit_event(session: Session) -> None:
        with pytest.raises(NoTransaction, match="in a transaction that has ended") as refusal:
            emit(session, "too late")
        refusals.append(refusal)

    event.listen(theirs, hook, emit_event)

    with theirs() as session:
        session.add(Row(name="new"))
        session.flush()
        session.commit() if hook == "after_commit" else session.rollback()

    assert len(refusals) == 1
    assert written(engine) == []


def test_an_error_of_after_commit_reaches_the_caller(transact: Transact) -> None:
    class Hooked(Session):
        pass

    event.listen(Hooked, "after_commit", lambda session: emit(session, "too late"))

    with pytest.raises(NoTransaction):
        transact(Hooked, lambda session: session.add(Row(name="new")))


def test_an_event_after_the_commit_is_refused_until_the_next_transaction_begins(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session:
        uow = UnitOfWork(session)
        session.add(Row(name="a"))
        uow.emit(a_quote("a"))
        session.commit()
        with pytest.raises(NoTransaction, match=r"price_quoted.v1 .*after the commit.*session\.begin\(\)"):
            uow.emit(a_quote("between"))
        session.add(Row(name="b"))
        uow.emit(a_quote("b"))
        session.commit()
    with pytest.raises(NoTransaction, match="after the commit"):
        uow.emit(a_quote("closed"))

    assert written(engine) == ["a", "b"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_event_after_the_block_of_its_unit_of_work_is_refused(
    engine: Engine, sessions: sessionmaker[Session], fails: bool
) -> None:
    with suppress(ZeroDivisionError), unit_of_work(sessions) as uow:
        if fails:
            raise ZeroDivisionError

    with pytest.raises(NoTransaction, match="after the block of its unit of work"):
        uow.emit(a_quote())
    assert written(engine) == []


def test_an_event_after_a_run_unit_of_work_is_refused(sessions: sessionmaker[Session], async_url: str) -> None:
    uows: list[UnitOfWork] = []
    run_unit_of_work(sessions, uows.append)

    async def scenario() -> None:
        async def work(uow: UnitOfWork, _session: AsyncSession) -> None:
            uows.append(uow)

        async_engine = create_async_engine(async_url)
        await run_unit_of_work_async(async_sessionmaker(async_engine), work)
        await async_engine.dispose()

    asyncio.run(scenario())

    assert len(uows) == 2
    for uow in uows:
        with pytest.raises(NoTransaction, match="after the block"):
            uow.emit(a_quote())


def test_an_event_after_a_commit_or_rollback_inside_of_the_block_is_refused(sessions: sessionmaker[Session]) -> None:
    with unit_of_work(sessions) as uow:
        uow.session.commit()
        with pytest.raises(NoTransaction, match="after the commit"):
            uow.emit(a_quote())
    with unit_of_work(sessions) as uow:
        uow.session.rollback()
        with pytest.raises(NoTransaction, match="can begin no transaction for it"):
            uow.emit(a_quote())


def test_an_event_after_a_failed_flush_is_refused_until_the_rollback(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session:
        session.add(Row(name="to change"))
        with pytest.raises(sqlalchemy.exc.IntegrityError):
            session.flush()
        with pytest.raises(NoTransaction, match="a failed flush"):
            emit(session, "lost")
        session.rollback()
        emit(session, "meant")
        session.commit()

    assert written(engine) == ["meant"]


def test_a_session_that_does_not_begin_by_itself_is_not_begun_for_an_event(
    engine: Engine, theirs: sessionmaker[Session]
) -> None:
    with theirs(autobegin=False) as session:
        with pytest.raises(NoTransaction, match="autobegin=False"):
            emit(session, "lost")
        with session.begin():
            emit(session, "meant")

    assert written(engine) == ["meant"]


def test_a_session_closed_for_good_takes_no_event(theirs: sessionmaker[Session]) -> None:
    session = theirs(close_resets_only=False)
    session.close()

    with pytest.raises(NoTransaction, match="permanently closed"):
        emit(session, "lost")


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        (lambda engine, _url: None, "got None; without SQLAlchemy's ORM"),
        (lambda engine, _url: engine, "got sqlalchemy.engine.base.Engine; "),
        (lambda engine, _url: sessionmaker(engine), "sessionmaker; call it"),
        (lambda engine, _url: Session, "got builtins.type; call it"),
        (lambda engine, _url: engine.connect(), r"base\.Connection; open a session on it \(Session\(bind=connection"),
        (lambda engine, url: create_async_engine(url).connect(), r"AsyncConnection; .* \(AsyncSession\(bind="),
        (lambda engine, _url: engine.raw_connection(), r"append_event"),
        (lambda engine, _url: "postgresql://", r"got builtins\.str; "),
    ],
)
def test_a_unit_of_work_on_anything_but_a_session_is_refused(
    engine: Engine, async_url: str, what: Callable[[Engine, str], Any], complaint: str
) -> None:
    given = what(engine, async_url)
    try:
        with pytest.raises(TypeError, match=complaint):
            UnitOfWork(given)
    finally:
        if isinstance(given, Connection):
            given.close()


def test_a_connection_of_psycopg_is_no_session(database_url: str) -> None:
    with psycopg.connect(database_url) as connection, pytest.raises(TypeError, match="append_event"):
        UnitOfWork(connection)  # type: ignore[arg-type] # what a caller without a type checker does


def test_a_scoped_session_is_the_session_at_hand(engine: Engine, async_url: str) -> None:
    registry = scoped_session(sessionmaker(engine))
    UnitOfWork(registry).emit(a_quote("scoped"))
    registry.add(Row(name="scoped"))
    registry.commit()
    registry.remove()

    async def scenario() -> None:
        async_engine = create_async_engine(async_url)
        scoped = async_scoped_session(async_sessionmaker(async_engine), scopefunc=asyncio.current_task)
        UnitOfWork(scoped).emit(a_quote("async"))
        scoped.add(Row(name="async"))
        await scoped.commit()
        await scoped.remove()
        await async_engine.dispose()

    asyncio.run(scenario())

    assert state(engine) == {"scoped", "async"}
    assert written(engine) == ["scoped", "async"]


# Dropped, and said so --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset", "invalidate"])
def test_a_session_closed_without_a_commit_says_what_it_drops(
    engine: Engine, sessions: sessionmaker[Session], end: str
) -> None:
    session = sessions()
    session.add(Row(name="new"))
    for symbol in "abcde":
        emit(session, symbol)

    with pytest.warns(EventsDropped, match=r"drops 5 events \(pricing.price_quoted.v1 .*, 2 more\)"):
        getattr(session, end)()

    session.commit()
    session.close()
    assert (state(engine), written(engine)) == (set(), [])


def test_what_was_written_in_a_savepoint_is_dropped_as_loudly(sessions: sessionmaker[Session]) -> None:
    session = sessions()
    with session.begin_nested():
        emit(session, "inside")

    with pytest.warns(EventsDropped, match=r"drops 1 event \("):
        session.close()


def test_a_session_that_nobody_closes_says_what_it_drops(sessions: sessionmaker[Session]) -> None:
    session = sessions()
    emit(session, "forgotten")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del session
        gc.collect()

    assert [one.category for one in caught] == [EventsDropped]


def test_an_async_session_closed_without_a_commit_says_what_it_drops(async_url: str) -> None:
    async def scenario() -> None:
        async_engine: AsyncEngine = create_async_engine(async_url)
        async with AsyncSession(async_engine) as session:
            UnitOfWork(session).emit(a_quote("forgotten"))
        await async_engine.dispose()

    with pytest.warns(EventsDropped, match="drops 1 event"):
        asyncio.run(scenario())


def test_a_rollback_or_an_exception_drops_events_without_a_warning(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    with sessions() as session:
        emit(session, "rolled back")
        session.rollback()
        with session.begin_nested():
            emit(session, "rolled back with a savepoint")
        session.rollback()
        session.add(Row(name="to change"))
        emit(session, "failed in the flush")
        with suppress(sqlalchemy.exc.IntegrityError):
            session.commit()
        session.rollback()

    def fail() -> None:
        with sessions() as session:
            emit(session, "failed")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert written(engine) == []


# Never written ---------------------------------------------------------------------------------------


def test_a_commit_that_leaves_an_event_unwritten_raises(engine: Engine, sessions: sessionmaker[Session]) -> None:
    # Somebody takes our listeners away: nothing else is known to do it.
    event.remove(Session, "before_commit", emitting._before_commit)
    try:
        with sessions() as session:
            session.add(Row(name="new"))
            emit(session, "lost")
            with pytest.raises(EventsNotWritten, match=r"without 1 event \(pricing.price_quoted.v1 .*emitted in it"):
                session.commit()
            session.add(Row(name="next"))  # the session is whole
            session.commit()
    finally:
        event.listen(Session, "before_commit", emitting._before_commit)

    assert (state(engine), written(engine)) == ({"new", "next"}, [])


def test_session_info_belongs_to_the_service(engine: Engine, sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        emit(session, "kept")
        session.info.clear()
        session.expunge_all()
        session.commit()

    assert written(engine) == ["kept"]


# A database error that somebody caught ---------------------------------------------------------------


def swallow(session: Session) -> None:
    with suppress(sqlalchemy.exc.IntegrityError):
        session.execute(text("insert into public.rows_of_theirs values ('to change', '')"))


def swallow_in_a_flush(session: Session) -> None:
    session.add(Row(name="to change"))
    with suppress(sqlalchemy.exc.IntegrityError):
        session.flush()


@pytest.mark.parametrize("mistake", [swallow, swallow_in_a_flush])
@pytest.mark.parametrize("symbols", [[], ["A"]])
def test_a_block_that_caught_a_database_error_does_not_end_as_if_it_had_committed(
    engine: Engine, sessions: sessionmaker[Session], async_url: str, mistake: Any, symbols: list[str]
) -> None:
    def work(uow: UnitOfWork) -> None:
        uow.session.execute(text("insert into public.rows_of_theirs values ('innocent', '')"))
        for symbol in symbols:
            uow.emit(a_quote(symbol))
        mistake(uow.session)

    with pytest.raises(AbortedTransaction, match="begin_nested"), unit_of_work(sessions) as uow:
        work(uow)
    with pytest.raises(AbortedTransaction, match="begin_nested"):
        run_unit_of_work(sessions, work)

    async def scenario() -> None:
        async def async_work(uow: UnitOfWork, session: AsyncSession) -> None:
            await session.run_sync(lambda _: work(uow))

        async_engine = create_async_engine(async_url)
        with pytest.raises(AbortedTransaction, match="begin_nested"):
            await run_unit_of_work_async(async_sessionmaker(async_engine), async_work)
        await async_engine.dispose()

    asyncio.run(scenario())

    assert (state(engine), written(engine)) == (set(), [])


def test_the_cure_that_the_error_names_works(engine: Engine, sessions: sessionmaker[Session]) -> None:
    with unit_of_work(sessions) as uow:
        uow.session.execute(text("insert into public.rows_of_theirs values ('innocent', '')"))
        uow.emit(a_quote("A"))
        with suppress(sqlalchemy.exc.IntegrityError), uow.session.begin_nested():
            uow.session.execute(text("insert into public.rows_of_theirs values ('to change', '')"))

    assert (state(engine), written(engine)) == ({"innocent"}, ["A"])


def test_a_session_of_the_services_own_with_events_already_written_is_refused_too(
    engine: Engine, transact: Transact
) -> None:
    def work(session: Session) -> None:
        with session.begin_nested():
            emit(session, "written with the savepoint")
        swallow(session)

    with warnings.catch_warnings():
        # An AsyncSession that is closed does not learn of the exception on its way.
        warnings.simplefilter("ignore", EventsDropped)
        with pytest.raises(AbortedTransaction, match="begin_nested"):
            transact(Session, work)

    assert written(engine) == []
