"""Wherever in a transaction a hook emits an event, it is written with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy.exc
from sqlalchemy import Engine, create_engine, event, make_url, text
from sqlalchemy.orm import Session, object_session, sessionmaker

from domain.pricing import PriceQuoted
from dovecote.errors import NoTransaction
from dovecote.unit_of_work import UnitOfWork, run_unit_of_work, unit_of_work
from tests.support.quotes import NOON, a_quote
from tests.support.rows import Row, Transact, emit, state, written

pytestmark = [pytest.mark.servers, pytest.mark.filterwarnings("error::dovecote.errors.EventsDropped")]

# In hooks --------------------------------------------------------------------------------------------

OF_SESSIONS = [
    "after_begin",
    "after_transaction_create",
    "after_attach",
    "do_orm_execute",
    "before_flush",
    "after_flush",
    "after_flush_postexec",
    "before_commit",
    "pending_to_persistent",
    "persistent_to_deleted",
]
OF_MAPPERS = ["before_insert", "after_insert", "before_update", "after_update", "before_delete", "after_delete"]
HOOKS = [*OF_SESSIONS, *OF_MAPPERS, "set"]


@contextmanager
def emitting_in(hook: str, session_class: Any, symbol: str) -> Iterator[None]:
    """Let a hook, as a service would write it, emit one event."""
    emitted: list[str] = []

    def once(session: Session | None) -> None:
        if not emitted:
            emitted.append(symbol)
            emit(session, symbol)

    def of_session(session: Session, *_: Any) -> None:
        once(session)

    def of_mapper(_mapper: Any, _connection: Any, row: Row) -> None:
        once(object_session(row))

    def of_attribute(row: Row, *_: Any) -> None:
        once(object_session(row))

    def of_statement(statement: Any) -> None:
        once(statement.session)

    places: dict[str, tuple[Any, Callable[..., None]]] = {
        **dict.fromkeys(OF_SESSIONS, (session_class, of_session)),
        **dict.fromkeys(OF_MAPPERS, (Row, of_mapper)),
        "do_orm_execute": (session_class, of_statement),
        "set": (Row.note, of_attribute),
    }
    target, listener = places[hook]
    event.listen(target, hook, listener)
    try:
        yield
    finally:
        event.remove(target, hook, listener)
    assert emitted, "the hook was not called"


def insert_update_and_delete(session: Session, name: str = "new") -> None:
    to_change, to_delete = session.get_one(Row, "to change"), session.get_one(Row, "to delete")
    # From here on nothing is flushed before the commit.
    session.add(Row(name=name))
    to_change.note = "changed"
    session.delete(to_delete)


@pytest.mark.parametrize("earlier", [[], ["earlier"]], ids=["", "beside another event"])
@pytest.mark.parametrize("flush", [False, True], ids=["", "with a flush"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_event_of_a_hook_is_written_with_the_transaction(
    engine: Engine, transact: Transact, hook: str, flush: bool, earlier: list[str]
) -> None:
    class Hooked(Session):
        pass

    def work(session: Session) -> None:
        for symbol in earlier:
            emit(session, symbol)
        insert_update_and_delete(session)
        if flush:
            session.flush()

    with emitting_in(hook, Hooked, "of the hook"):
        transact(Hooked, work)

    assert state(engine) == {"new"}
    assert sorted(written(engine)) == [*earlier, "of the hook"]


@pytest.mark.parametrize("how", ["unit_of_work", "run_unit_of_work", "sessionmaker.begin", "a savepoint"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_emit_in_every_kind_of_block(engine: Engine, theirs: sessionmaker[Session], hook: str, how: str) -> None:
    with emitting_in(hook, theirs, "of the hook"):
        if how == "unit_of_work":
            with unit_of_work(theirs) as uow:
                insert_update_and_delete(uow.session)
        elif how == "run_unit_of_work":
            run_unit_of_work(theirs, lambda uow: insert_update_and_delete(uow.session))
        elif how == "sessionmaker.begin":
            with theirs.begin() as session:
                insert_update_and_delete(session)
        else:
            with theirs.begin() as session, session.begin_nested():
                insert_update_and_delete(session)

    assert (state(engine), written(engine)) == ({"new"}, ["of the hook"])


def test_all_hooks_at_once_lose_nothing(engine: Engine, transact: Transact) -> None:
    class Hooked(Session):
        pass

    hooks = [emitting_in(hook, Hooked, hook) for hook in HOOKS]
    for hook in hooks:
        hook.__enter__()
    try:
        transact(Hooked, insert_update_and_delete)
    finally:
        for hook in hooks:
            hook.__exit__(None, None, None)

    assert sorted(written(engine)) == sorted(HOOKS)


def test_a_flush_that_has_nothing_to_do_loses_nothing(engine: Engine, transact: Transact) -> None:
    class Hooked(Session):
        pass

    def touch(session: Session) -> None:
        row = session.get_one(Row, "to change")
        row.note = row.note  # dirty, and yet the same

    with emitting_in("before_flush", Hooked, "of the hook"):
        transact(Hooked, touch)

    assert written(engine) == ["of the hook"]


def test_a_session_that_said_nothing_to_postgres_before_its_commit_loses_nothing(
    engine: Engine, transact: Transact
) -> None:
    class Hooked(Session):
        pass

    with emitting_in("before_commit", Hooked, "of the hook"):
        transact(Hooked, lambda _session: None)

    assert written(engine) == ["of the hook"]


def test_an_object_added_by_a_hook_of_the_commit_emits_its_event_too(engine: Engine, transact: Transact) -> None:
    class Hooked(Session):
        pass

    def audit(session: Session, *_: Any) -> None:
        if any(row.name == "new" for row in session.new):
            session.add(Row(name="audit"))

    def emit_event(_mapper: Any, _connection: Any, row: Row) -> None:
        emit(object_session(row), row.name)

    event.listen(Hooked, "after_flush_postexec", lambda session, _: session.add(Row(name="last")) if not last else None)
    event.listen(Hooked, "after_flush_postexec", lambda *_: last.append(1))
    event.listen(Hooked, "before_flush", audit)
    event.listen(Row, "after_insert", emit_event)
    last: list[int] = []
    try:
        transact(Hooked, lambda session: session.add(Row(name="new")))
    finally:
        event.remove(Row, "after_insert", emit_event)

    assert state(engine) == {"new", "audit", "last"}
    assert sorted(written(engine)) == ["audit", "last", "new"]


@pytest.mark.parametrize("hook", ["before_flush", "before_insert", "after_insert", "after_flush", "before_commit"])
def test_an_event_of_the_commits_own_flush_is_written_after_the_state(
    engine: Engine, theirs: sessionmaker[Session], hook: str
) -> None:
    inserts: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.split()[0].lower() == "insert":
            inserts.append(statement.split()[2])

    event.listen(engine, "before_cursor_execute", note)
    try:
        with emitting_in(hook, theirs, "of the hook"), theirs() as session:
            session.add(Row(name="new"))
            session.commit()
    finally:
        event.remove(engine, "before_cursor_execute", note)

    assert inserts == ["public.rows_of_theirs", "dovecote.outbox"]


def test_a_hook_still_sees_what_is_new_when_no_event_waits(engine: Engine, theirs: sessionmaker[Session]) -> None:
    def emit_event(session: Session) -> None:
        for row in session.new:
            emit(session, row.name)

    event.listen(theirs, "before_commit", emit_event)

    with theirs() as session:
        session.add_all([Row(name="a"), Row(name="b")])
        session.commit()

    assert sorted(written(engine)) == ["a", "b"]


def test_two_sessions_keep_their_events_apart_in_their_hooks_too(engine: Engine, theirs: sessionmaker[Session]) -> None:
    def emit_event(session: Session, *_: Any) -> None:
        for row in session.new:
            emit(session, row.name)

    event.listen(theirs, "before_flush", emit_event)

    with theirs() as kept, theirs() as given_up:
        kept.add(Row(name="kept"))
        given_up.add(Row(name="given up"))
        given_up.flush()
        kept.commit()
        given_up.rollback()

    assert written(engine) == ["kept"]


@pytest.mark.parametrize("hook", ["before_flush", "after_insert", "before_commit", None])
def test_a_two_phase_commit_writes_its_events(engine: Engine, theirs: sessionmaker[Session], hook: str | None) -> None:
    if hook:
        with emitting_in(hook, theirs, "of the hook"), theirs(twophase=True) as session:
            session.add(Row(name="new"))
            session.commit()
    else:
        with theirs(twophase=True) as session:
            session.add(Row(name="new"))
            emit(session, "of the hook")
            session.prepare()
            with pytest.raises(NoTransaction, match="has ended"):
                emit(session, "too late")
            session.commit()

    assert (state(engine), written(engine)) == ({"new"}, ["of the hook"])


def test_a_session_goes_on_after_a_commit_with_late_events(engine: Engine, theirs: sessionmaker[Session]) -> None:
    def emit_event(session: Session, *_: Any) -> None:
        for row in session.new:
            emit(session, row.name)

    event.listen(theirs, "before_flush", emit_event)

    with theirs() as session:
        uow = UnitOfWork(session)
        for name in ("a", "b", "c"):
            session.add(Row(name=name))
            uow.emit(a_quote(f"beside {name}"))
            session.commit()
        session.add(Row(name="d"))
        session.flush()
        session.rollback()
        session.commit()

    assert written(engine) == ["beside a", "a", "beside b", "b", "beside c", "c"]


OLD = UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")  # RFC 9562's own example: refused by the database


@pytest.mark.parametrize("hook", ["before_flush", "after_insert", "before_commit"])
def test_a_late_event_that_the_database_refuses_leaves_nothing_behind_not_even_in_the_pool(
    engine: Engine, database_url: str, hook: str
) -> None:
    # An engine of the service's own: ours rolls back whatever comes to its pool in a transaction.
    alone = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"), pool_size=1, max_overflow=0)
    theirs = sessionmaker(alone)

    def emit_event(*arguments: Any) -> None:
        session: Any = object_session(arguments[2]) if hook == "after_insert" else arguments[0]
        refused = PriceQuoted(event_id=OLD, occurred_at=NOON, symbol="A", price=a_quote().price, as_of=NOON)
        UnitOfWork(session).emit(refused)

    event.listen(Row if hook == "after_insert" else theirs, hook, emit_event)
    session = theirs()
    session.add(Row(name="refused"))
    with pytest.raises(sqlalchemy.exc.IntegrityError, match="the outbox refuses the event"):
        session.commit()
    event.remove(Row if hook == "after_insert" else theirs, hook, emit_event)
    with suppress(Warning):  # nobody rolls back; the warning names the event
        session.close()

    with theirs() as session:
        session.add(Row(name="next"))
        session.commit()
    alone.dispose()
    assert (state(engine), written(engine)) == ({"next"}, [])


# Savepoints ------------------------------------------------------------------------------------------


def test_a_savepoint_rolled_back_drops_what_its_own_hooks_emitted(
    engine: Engine, theirs: sessionmaker[Session]
) -> None:
    def emit_event(session: Session, *_: Any) -> None:
        for row in session.new:
            emit(session, row.name)

    event.listen(theirs, "before_flush", emit_event)

    with theirs.begin() as session:
        outer = session.begin_nested()
        session.add(Row(name="given up"))
        with session.begin_nested():
            session.add(Row(name="given up too"))
        outer.rollback()
        with session.begin_nested():
            session.add(Row(name="kept"))
        session.add(Row(name="last"))

    assert state(engine) == {"kept", "last"}
    assert written(engine) == ["kept", "last"]


@pytest.mark.parametrize("hook", ["before_commit", "after_flush", "after_flush_postexec"])
def test_savepoints_inside_of_a_hook_of_the_commit_keep_their_meaning(
    engine: Engine, theirs: sessionmaker[Session], hook: str
) -> None:
    called: list[int] = []

    def emit_event(session: Session, *_: Any) -> None:
        if called:
            return
        called.append(1)
        emit(session, "before")
        savepoint = session.begin_nested()
        session.execute(text("insert into public.rows_of_theirs values ('inside')"))
        emit(session, "inside")
        savepoint.rollback()
        with session.begin_nested():
            emit(session, "kept")
        emit(session, "after")

    event.listen(theirs, hook, emit_event)

    with theirs() as session:
        session.add(Row(name="new"))
        session.commit()

    assert state(engine) == {"new"}
    assert written(engine) == ["before", "kept", "after"]


@pytest.mark.parametrize("hook", ["before_commit", "before_flush", "after_insert", "after_flush"])
def test_a_savepoint_left_open_at_the_end_of_a_block_loses_nothing_of_the_hooks(
    engine: Engine, theirs: sessionmaker[Session], hook: str
) -> None:
    with emitting_in(hook, theirs, "of the hook"), theirs() as session, session.begin():
        session.begin_nested()
        session.add(Row(name="new"))

    assert (state(engine), written(engine)) == ({"new"}, ["of the hook"])


def test_a_savepoint_that_a_failed_flush_has_rolled_back_emits_nothing(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    with unit_of_work(sessions) as uow:
        uow.emit(a_quote("before"))
        with uow.session.begin_nested():
            uow.session.execute(text("insert into public.rows_of_theirs values ('inside', '')"))
            uow.emit(a_quote("inside"))
            uow.session.add(Row(name="to change"))  # there is one
            with suppress(sqlalchemy.exc.IntegrityError):
                uow.session.flush()
        uow.emit(a_quote("after"))

    assert (state(engine), written(engine)) == (set(), ["before", "after"])


def test_a_savepoint_that_is_closed_emits_nothing(engine: Engine, sessions: sessionmaker[Session]) -> None:
    with unit_of_work(sessions) as uow:
        savepoint = uow.session.begin_nested()
        uow.emit(a_quote("inside"))
        savepoint.close()
        uow.emit(a_quote("after"))

    assert written(engine) == ["after"]
