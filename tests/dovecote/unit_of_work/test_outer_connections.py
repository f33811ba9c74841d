"""A session on a Connection of somebody else: the event goes where the state goes."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from dovecote.errors import EventsDropped
from dovecote.unit_of_work import UnitOfWork
from tests.support.quotes import a_quote
from tests.support.rows import Row, emit, state, written

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("error::dovecote.errors.EventsDropped")]

MODES = ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["emit first", "emit last", "in a hook"])
@pytest.mark.parametrize("session_ends", ["not at all", "commit", "commit and close"])
def test_an_outer_transaction_commits_the_event_with_the_state(
    engine: Engine, theirs: sessionmaker[Session], mode: Any, order: str, session_ends: str
) -> None:
    with engine.begin() as connection:
        session = theirs(bind=connection, join_transaction_mode=mode)
        if order == "in a hook":
            event.listen(session, "after_flush", lambda session, _: emit(session, "outer"))
        if order == "emit first":
            emit(session, "outer")
        session.add(Row(name="new"))
        session.flush()
        if order == "emit last":
            emit(session, "outer")
        if session_ends != "not at all":
            session.commit()
        if session_ends == "commit and close":
            session.close()
        if mode == "control_fully" and session_ends != "not at all":
            # It has ended the outer transaction, and the block finds that in order.
            assert not connection.in_transaction()
    session.close()

    assert (state(engine), written(engine)) == ({"new"}, ["outer"])


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only"])
def test_a_session_closed_without_a_commit_leaves_its_event_where_it_leaves_its_state(
    engine: Engine, theirs: sessionmaker[Session], mode: Any
) -> None:
    with engine.begin() as connection, theirs(bind=connection, join_transaction_mode=mode) as session:
        emit(session, "outer")
        session.add(Row(name="new"))
        session.flush()

    assert (state(engine), written(engine)) == ({"new"}, ["outer"])


@pytest.mark.parametrize("mode", ["control_fully", "create_savepoint"])
def test_a_session_that_rolls_back_when_closed_drops_its_event_and_says_so(
    engine: Engine, theirs: sessionmaker[Session], mode: Any
) -> None:
    with engine.connect() as connection, connection.begin() as outer:
        session = theirs(bind=connection, join_transaction_mode=mode)
        emit(session, "dropped")
        session.add(Row(name="new"))
        session.flush()
        with pytest.warns(EventsDropped, match="drops 1 event"):
            session.close()
        if outer.is_active:
            outer.commit()

    assert (state(engine), written(engine)) == (set(), [])


@pytest.mark.parametrize("mode", MODES)
def test_what_the_session_rolled_back_does_not_come_with_the_outer_commit(
    engine: Engine, theirs: sessionmaker[Session], mode: Any
) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        session = theirs(bind=connection, join_transaction_mode=mode)
        emit(session, "rolled back")
        session.add(Row(name="rolled back"))
        session.flush()
        session.rollback()
        if outer.is_active:
            outer.commit()
        session.close()
        with connection.begin():
            connection.execute(text("insert into public.rows_of_theirs values ('later', '')"))

    assert (state(engine), written(engine)) == ({"later"}, [])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("commits", [False, True])
def test_an_outer_rollback_takes_the_event_along_and_leaks_nothing_into_the_next_transaction(
    engine: Engine, theirs: sessionmaker[Session], mode: Any, commits: bool
) -> None:
    if commits and mode == "control_fully":
        return  # then the session's commit is the outer one
    with engine.connect() as connection:
        outer = connection.begin()
        session = theirs(bind=connection, join_transaction_mode=mode)
        session.add(Row(name="rolled back"))
        session.flush()
        emit(session, "rolled back")
        if commits:
            session.commit()
        outer.rollback()
        with connection.begin():
            connection.execute(text("insert into public.rows_of_theirs values ('later', '')"))
        session.close()

    assert (state(engine), written(engine)) == ({"later"}, [])


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only"])
def test_savepoints_of_the_outer_connection_take_the_events_along(
    engine: Engine, theirs: sessionmaker[Session], mode: Any
) -> None:
    with engine.connect() as connection, connection.begin():
        session = theirs(bind=connection, join_transaction_mode=mode)
        session.add(Row(name="before"))
        emit(session, "before")
        session.flush()
        given_up = connection.begin_nested()
        session.add(Row(name="given up"))
        emit(session, "given up")
        session.flush()
        given_up.rollback()
        kept = connection.begin_nested()
        session.add(Row(name="kept"))
        emit(session, "kept")
        session.flush()
        kept.commit()

    session.close()
    assert (state(engine), written(engine)) == ({"before", "kept"}, ["before", "kept"])


@pytest.mark.parametrize("mode", MODES)
def test_savepoints_of_the_session_keep_their_meaning_on_an_outer_connection(
    engine: Engine, theirs: sessionmaker[Session], mode: Any
) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        session = theirs(bind=connection, join_transaction_mode=mode)
        emit(session, "before")
        savepoint = session.begin_nested()
        session.execute(text("insert into public.rows_of_theirs values ('given up', '')"))
        emit(session, "given up")
        savepoint.rollback()
        with session.begin_nested():
            session.execute(text("insert into public.rows_of_theirs values ('kept', '')"))
            emit(session, "kept")
        session.commit()
        if outer.is_active:
            outer.commit()

    session.close()
    assert (state(engine), written(engine)) == ({"kept"}, ["before", "kept"])


def test_an_async_session_on_an_outer_connection_keeps_its_event(engine: Engine, async_url: str) -> None:
    async def scenario() -> None:
        async_engine = create_async_engine(async_url)
        async with async_engine.begin() as connection:
            session = AsyncSession(bind=connection)
            UnitOfWork(session).emit(a_quote("outer"))
            session.add(Row(name="new"))
            await session.flush()
        await session.close()
        await async_engine.dispose()

    asyncio.run(scenario())

    assert (state(engine), written(engine)) == ({"new"}, ["outer"])


def test_a_long_lived_connection_keeps_no_listener_of_a_session_that_has_ended(
    engine: Engine, theirs: sessionmaker[Session]
) -> None:
    with engine.connect() as connection:
        for number in range(3):
            with theirs(bind=connection) as session:
                emit(session, f"S{number}")
                session.commit()
        assert len(connection.dispatch.commit) == 0
        assert len(connection.dispatch.rollback_savepoint) == 0

    assert written(engine) == ["S0", "S1", "S2"]
