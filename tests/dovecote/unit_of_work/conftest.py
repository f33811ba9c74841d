"""A table of theirs, and sessions with hooks."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, make_url, text
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    create_async_engine,
)
from sqlalchemy.orm import Session, sessionmaker

from tests.support.rows import Base, Transact


@pytest.fixture(autouse=True)
def _fresh_tables(engine: Engine) -> None:
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(text("truncate dovecote.outbox, public.rows_of_theirs"))
        connection.execute(text("insert into public.rows_of_theirs values ('to change', ''), ('to delete', '')"))


@pytest.fixture
def theirs(engine: Engine) -> sessionmaker[Session]:
    """Sessions of a class of their own, which a test may give listeners."""
    return sessionmaker(engine, expire_on_commit=False)


@pytest.fixture(params=["Session", "AsyncSession"])
def transact(request: pytest.FixtureRequest, engine: Engine, async_url: str) -> Transact:
    """Do something in a session of a class of listeners, and commit."""

    def with_a_session(session_class: Any, work: Callable[[Session], object]) -> None:
        with session_class(engine) as session:
            work(session)
            session.commit()

    def with_an_async_session(session_class: Any, work: Callable[[Session], object]) -> None:
        async def scenario() -> None:
            async_engine = create_async_engine(async_url)
            try:
                async with AsyncSession(async_engine, sync_session_class=session_class) as session:
                    await session.run_sync(work)
                    await session.commit()
            finally:
                await async_engine.dispose()

        asyncio.run(scenario())

    return with_a_session if request.param == "Session" else with_an_async_session


@pytest.fixture
def async_url(database_url: str) -> str:
    return make_url(database_url).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
