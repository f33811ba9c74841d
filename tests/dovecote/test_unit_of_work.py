"""State and events commit together or not at all, whatever the transaction goes through."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy.exc
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from psycopg.rows import TupleRow
from sqlalchemy import Engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.exc import StaleDataError

from domain import billing
from domain.pricing import PriceQuoted
from dovecote.errors import EventsDropped, InvalidEvent
from dovecote.outbox import MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import UnitOfWork, run_unit_of_work, run_unit_of_work_async, unit_of_work
from tests.support.quotes import NOON, a_quote

pytestmark = pytest.mark.servers

Connection = psycopg.Connection[TupleRow]


@pytest.fixture(autouse=True)
def _an_empty_outbox(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("truncate dovecote.outbox"))


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def written(engine: Engine) -> list[str]:
    """The symbols of the events in the outbox, in order."""
    with engine.connect() as connection:
        return list(connection.scalars(text("select aggregate_id from dovecote.outbox order by position")))


# With the state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("autoflush", [True, False])
def test_an_event_is_written_after_the_state_it_describes(engine: Engine, autoflush: bool) -> None:
    sessions = sessionmaker(engine, autoflush=autoflush)
    statements: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(" ".join(statement.lower().split()))

    event.listen(engine, "before_cursor_execute", note)
    try:
        with unit_of_work(sessions) as uow:
            billing.start_membership(uow, "user-1", billing.Tier.FREE, NOON)
    finally:
        event.remove(engine, "before_cursor_execute", note)

    inserts = [statement.split()[2] for statement in statements if statement.startswith("insert")]
    assert inserts == ["dovecote.memberships", "dovecote.outbox"]


def test_many_events_are_one_statement_in_the_order_they_were_emitted(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    symbols = [f"S{number}" for number in range(500)]

    with unit_of_work(sessions) as uow:
        for symbol in symbols:
            uow.emit(a_quote(symbol))
        assert written(engine) == []

    assert written(engine) == symbols


def test_concurrent_writers_of_one_aggregate_write_its_events_in_the_order_of_its_changes(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    with engine.begin() as connection:
        connection.execute(text("create table if not exists counter (version int)"))
        connection.execute(text("insert into counter values (0)"))

    def change() -> None:
        for _ in range(20):
            with unit_of_work(sessions) as uow:
                version = uow.session.scalar(text("update counter set version = version + 1 returning version"))
                uow.emit(a_quote("EUR", version))

    threads = [threading.Thread(target=change) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    with engine.connect() as connection:
        prices = list(connection.scalars(text("select payload ->> 'price' from dovecote.outbox order by position")))
    assert prices == [str(version) for version in range(1, 161)]


def test_a_rolled_back_transaction_emits_nothing(engine: Engine, sessions: sessionmaker[Session]) -> None:
    def fail() -> None:
        with unit_of_work(sessions) as uow:
            uow.emit(a_quote())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert written(engine) == []


# Savepoints ---------------------------------------------------------------------------------------


def test_a_rolled_back_savepoint_drops_what_was_emitted_inside(engine: Engine, sessions: sessionmaker[Session]) -> None:
    with unit_of_work(sessions) as uow:
        uow.emit(a_quote("before"))
        savepoint = uow.session.begin_nested()
        uow.emit(a_quote("inside"))
        savepoint.rollback()
        uow.emit(a_quote("after"))

    assert written(engine) == ["before", "after"]


def test_what_was_emitted_before_a_savepoint_survives_its_rollback(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    with unit_of_work(sessions) as uow:
        uow.emit(a_quote("before"))
        outer = uow.session.begin_nested()
        uow.emit(a_quote("outer"))
        with uow.session.begin_nested():
            uow.emit(a_quote("inner"))
        outer.rollback()

    assert written(engine) == ["before"]


def test_a_savepoint_left_open_at_the_commit_loses_nothing(engine: Engine, sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        uow = UnitOfWork(session)
        uow.emit(a_quote("before"))
        session.begin_nested()
        uow.emit(a_quote("inside"))
        session.begin_nested()
        uow.emit(a_quote("deeper"))
        session.commit()

    assert written(engine) == ["before", "inside", "deeper"]


@given(st.lists(st.sampled_from(["emit", "open", "release", "roll back"]), max_size=25))
@settings(max_examples=60, deadline=None)
def test_no_nesting_of_savepoints_loses_or_keeps_what_it_should_not(
    engine: Engine, sessions: sessionmaker[Session], steps: Sequence[str]
) -> None:
    with engine.begin() as connection:
        connection.execute(text("truncate dovecote.outbox"))
    kept: list[list[str]] = [[]]  # of the transaction, and of each savepoint that is open

    with unit_of_work(sessions) as uow:
        opened = []
        for number, step in enumerate(steps):
            if step == "emit":
                uow.emit(a_quote(f"S{number}"))
                kept[-1].append(f"S{number}")
            elif step == "open":
                opened.append(uow.session.begin_nested())
                kept.append([])
            elif opened and step == "release":
                opened.pop().commit()
                inside = kept.pop()
                kept[-1] += inside
            elif opened:
                opened.pop().rollback()
                kept.pop()

    assert written(engine) == [symbol for level in kept for symbol in level]


def test_a_session_closed_without_commit_leaks_nothing_into_its_next_transaction(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    session = sessions()
    UnitOfWork(session).emit(a_quote("given up"))
    with pytest.warns(EventsDropped):
        session.close()

    UnitOfWork(session).emit(a_quote("meant"))
    session.commit()
    session.close()

    assert written(engine) == ["meant"]


# In other people's transactions -------------------------------------------------------------------


def test_a_unit_of_work_joins_a_transaction_that_a_service_already_has(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    with sessions.begin() as session:
        session.execute(text("create table if not exists theirs (n int)"))
        UnitOfWork(session).emit(a_quote("one"))
        UnitOfWork(session).emit(a_quote("two"))

    assert written(engine) == ["one", "two"]


def test_an_async_session_commits_its_events_too(engine: Engine, database_url: str) -> None:
    async def work() -> None:
        async_engine = create_async_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
        async with AsyncSession(async_engine) as session:
            async with session.begin():
                UnitOfWork(session).emit(a_quote("committed"))
            await session.begin()
            UnitOfWork(session).emit(a_quote("rolled back"))
            await session.rollback()
            UnitOfWork(session).emit(a_quote("later"))
            await session.commit()
        await async_engine.dispose()

    asyncio.run(work())

    assert written(engine) == ["committed", "later"]


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quote", "complaint"),
    [
        (lambda: a_quote(""), "1 to 200 characters, got 0"),
        (lambda: a_quote("x" * 201), "1 to 200 characters, got 201"),
        (lambda: a_quote("a\x00b"), "NUL"),
        (lambda: a_quote("a\ud800b"), "not JSON"),
        (lambda: a_quote(cast("str", {1, 2})), "not JSON"),
        (lambda: PriceQuoted(event_id=uuid4(), occurred_at=NOON, symbol="A", price=a_quote().price, as_of=NOON), "v7"),
        (lambda: PriceQuoted(occurred_at=datetime(2026, 1, 1), symbol="A", price=a_quote().price, as_of=NOON), "zone"),  # noqa: DTZ001
    ],
)
def test_an_event_that_the_outbox_would_refuse_is_refused_when_it_is_emitted(
    engine: Engine, sessions: sessionmaker[Session], quote: Any, complaint: str
) -> None:
    with unit_of_work(sessions) as uow:
        with pytest.raises(InvalidEvent, match=complaint):
            uow.emit(quote())
        uow.emit(a_quote("well"))

    assert written(engine) == ["well"]


def test_an_id_from_long_ago_is_refused_by_the_database(sessions: sessionmaker[Session]) -> None:
    old = UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")  # RFC 9562's own example

    def write() -> None:
        with unit_of_work(sessions) as uow:
            uow.emit(PriceQuoted(event_id=old, occurred_at=NOON, symbol="A", price=a_quote().price, as_of=NOON))

    with pytest.raises(sqlalchemy.exc.IntegrityError, match=f"the outbox refuses the event: id {old} is of 2022"):
        write()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=200))
@example("\\u0000")
@example('"\\')
@settings(max_examples=60, deadline=None)
def test_whatever_text_is_taken_comes_back_the_same(
    engine: Engine, sessions: sessionmaker[Session], symbol: str
) -> None:
    with engine.begin() as connection:
        connection.execute(text("truncate dovecote.outbox"))
    with unit_of_work(sessions) as uow:
        uow.emit(a_quote(symbol))

    with engine.connect() as connection:
        row = connection.execute(
            text("select aggregate_id, payload, dovecote.envelope(o) as envelope from dovecote.outbox o")
        ).one()
    assert row.aggregate_id == row.payload["symbol"] == symbol
    assert json.loads(row.envelope)["subject"] == json.loads(row.envelope)["data"]["symbol"] == symbol


class _Large(PriceQuoted, type="testing.large.v1", aggregate="large", key="price"):
    """A quote whose symbol is not its key, so that it may be as long as a payload."""


def test_the_largest_payload_that_is_taken_fits_the_table(sessions: sessionmaker[Session], engine: Engine) -> None:
    def a_large_event(more: int) -> _Large:
        quote = _Large(occurred_at=NOON, symbol="", price=a_quote().price, as_of=NOON)
        empty = len(json.dumps(quote.payload()))
        return _Large(occurred_at=NOON, symbol="x" * (MAX_PAYLOAD_BYTES - empty + more), price=quote.price, as_of=NOON)

    with unit_of_work(sessions) as uow:
        uow.emit(a_large_event(0))
        with pytest.raises(InvalidEvent, match="at most"):
            uow.emit(a_large_event(1))

    assert written(engine) == ["1"]


def test_the_largest_headers_that_are_taken_fit_the_table(sessions: sessionmaker[Session], engine: Engine) -> None:
    headers: dict[str, str] = {}
    while len(json.dumps(headers)) < MAX_HEADER_BYTES - 20:
        headers[f"{len(headers):x}"] = ""

    with unit_of_work(sessions, headers) as uow:
        uow.emit(a_quote())

    assert written(engine) == ["EUR"]


# Headers ------------------------------------------------------------------------------------------


def test_the_trace_of_the_caller_travels_with_its_events(engine: Engine, sessions: sessionmaker[Session]) -> None:
    tracer = TracerProvider().get_tracer("test")

    with (
        tracer.start_as_current_span("a request") as span,
        unit_of_work(sessions, {"correlation_id": "abc"}) as uow,
    ):
        uow.emit(a_quote())

    with engine.connect() as connection:
        envelope = json.loads(connection.scalar(text("select dovecote.envelope(o) from dovecote.outbox o")) or "")
    context = span.get_span_context()
    assert envelope["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert envelope["correlationid"] == "abc"


def test_an_event_outside_of_any_trace_has_no_trace(engine: Engine, sessions: sessionmaker[Session]) -> None:
    with unit_of_work(sessions) as uow:
        uow.emit(a_quote())

    with engine.connect() as connection:
        assert connection.scalar(text("select headers from dovecote.outbox")) == {}


# append_event: the front door for every language ----------------------------------------------------

GOOD = {
    "aggregate_type": "price",
    "aggregate_id": "EUR",
    "event_type": "pricing.price_quoted.v1",
    "payload": "{}",
    "headers": "{}",
}


def append_event(connection: Connection, **different: object) -> UUID:
    row = connection.execute(
        "select dovecote.append_event(%(aggregate_type)s, %(aggregate_id)s, %(event_type)s, %(payload)s, %(headers)s)",
        {**GOOD, **different},
    ).fetchone()
    assert row
    id: UUID = row[0]
    return id


def test_append_event_writes_one_event_and_returns_its_id(connection: Connection) -> None:
    began = datetime.now(UTC)

    id = append_event(connection, payload='{"symbol": "EUR"}', headers=None)

    assert connection.execute("select id, aggregate_id, payload, headers from dovecote.outbox").fetchall() == [
        (id, "EUR", {"symbol": "EUR"}, {})
    ]
    assert id.version == 7
    assert abs((id.int >> 80) / 1000 - began.timestamp()) < 5


@pytest.mark.parametrize(
    ("different", "complaint"),
    [
        ({"aggregate_type": "Price"}, "aggregate_type 'Price' is not a lower-case word"),
        ({"aggregate_type": None}, "aggregate_type NULL"),
        ({"aggregate_id": ""}, "aggregate_id must have 1 to 200 characters, got 0"),
        ({"aggregate_id": None}, "aggregate_id must have 1 to 200 characters, got null"),
        ({"aggregate_id": "x" * 201}, "got 201"),
        ({"event_type": "quoted"}, "event_type 'quoted' is not <slice>.<event>.v<n>"),
        ({"event_type": "a.b.v0"}, "event_type 'a.b.v0'"),
        ({"event_type": None}, "event_type NULL"),
        ({"event_type": f"a.{'b' * 200}.v1"}, "event_type"),
        ({"event_type": "a.b.v1\n"}, "event_type"),
        ({"aggregate_type": "price\n"}, "aggregate_type"),
        ({"payload": "[]"}, "payload must be a JSON object, got array"),
        ({"payload": None}, "payload must be a JSON object, got null"),
        ({"payload": json.dumps({"x": "y" * 262_145})}, "at most 262144 are taken"),
        ({"headers": "[]"}, "headers must be a JSON object, got array"),
        ({"headers": json.dumps({"x": "y" * 16_385})}, "at most 16384 are taken"),
    ],
)
def test_append_event_refuses_in_words_what_the_outbox_would_refuse(
    connection: Connection, different: dict[str, object], complaint: str
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        append_event(connection, **different)

    assert "the outbox refuses the event: " in str(refused.value)
    assert complaint in str(refused.value)
    assert connection.execute("select count(*) from dovecote.outbox").fetchone() == (0,)


def test_append_event_wakes_a_relay_that_sleeps_and_notifies_no_other(
    connection: Connection, database_url: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as relay:
        relay.execute("listen dovecote_outbox")
        append_event(connection)
        assert list(relay.notifies(timeout=0.1)) == [], "nobody slept"

        relay.execute("select pg_advisory_lock(dovecote.wakeup_key())")
        with connection.transaction():
            append_event(connection)
            append_event(connection)

        assert [heard.channel for heard in relay.notifies(timeout=2, stop_after=1)] == ["dovecote_outbox"]


# Roles --------------------------------------------------------------------------------------------


def test_a_writer_may_append(connection: Connection) -> None:
    connection.execute("set role dovecote_writer")

    append_event(connection)
    connection.execute(
        "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)"
        " values ('a', 'b', 'c.d.v1', '{}')"
    )

    connection.execute("reset role")
    assert connection.execute("select count(*) from dovecote.outbox").fetchone() == (2,)


@pytest.mark.parametrize(
    "statement",
    [
        "select * from dovecote.outbox",
        "update dovecote.outbox set payload = '{}'",
        "delete from dovecote.outbox",
        "truncate dovecote.outbox",
        "select * from dovecote.outbox_events",
        "select * from dovecote.processed_events",
        "insert into dovecote.processed_events (event_id, handler_name) values (dovecote.uuid_v7(), 'a')",
        "select * from dovecote.deliveries",
        "delete from dovecote.deliveries",
        "update dovecote.relay_state set checkpoint = 1000000",
        "insert into dovecote.published_batches (positions, events, epoch) values ('{[1,1000)}', 1, 1)",
        "insert into dovecote.subscriptions (handler_name, event_type, since_position) values ('a', 'a.b.v1', 1)",
        "select * from dovecote.audit_log",
        "select setval('dovecote.outbox_position', 1)",
        "select dovecote.ensure_partitions()",
        "create table dovecote.mine (n int)",
        "alter table dovecote.outbox disable trigger announce",
        "drop table dovecote.outbox",
        # A position of one's own choice would lie where the relay has already been.
        "insert into dovecote.outbox (position, aggregate_type, aggregate_id, event_type, payload)"
        " values (1, 'a', 'b', 'c.d.v1', '{}')",
    ],
)
def test_a_writer_may_do_nothing_else(connection: Connection, statement: str) -> None:
    connection.execute("set role dovecote_writer")

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement)


@pytest.mark.parametrize("role", ["dovecote_writer", "dovecote_worker", "dovecote_operator"])
def test_nobody_gets_into_a_partition_by_the_back_door(connection: Connection, role: str) -> None:
    partitions = connection.execute(
        "select relname from pg_inherits join pg_class on oid = inhrelid where inhparent = 'dovecote.outbox'::regclass"
    ).fetchall()
    connection.execute(f"set role {role}")

    for (partition,) in partitions:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(
                f"insert into dovecote.{partition} (aggregate_type, aggregate_id, event_type, payload)"
                " values ('a', 'b', 'c.d.v1', '{}')"
            )


# Again, when another transaction was in the way -----------------------------------------------------


@pytest.fixture
def accounts(engine: Engine) -> Iterator[None]:
    with engine.begin() as connection:
        connection.execute(text("create table accounts (name text primary key, cents int)"))
        connection.execute(text("insert into accounts values ('a', 0), ('b', 0)"))
    yield
    with engine.begin() as connection:
        connection.execute(text("drop table accounts"))


def add(uow: UnitOfWork, name: str) -> None:
    uow.session.execute(text("update accounts set cents = cents + 1 where name = :name"), {"name": name})


def cents(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(text("select cents from accounts order by name")))


@pytest.mark.usefixtures("accounts")
def test_transactions_that_deadlock_all_come_through_with_their_events(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    tries = []
    meeting = threading.Barrier(2)

    def transfer(first: str, second: str) -> None:
        def work(uow: UnitOfWork) -> None:
            tries.append(first)
            add(uow, first)
            if len(tries) <= 2:
                meeting.wait(10)  # each holds what the other wants next
            add(uow, second)
            uow.emit(a_quote(first))

        run_unit_of_work(sessions, work)

    threads = [threading.Thread(target=transfer, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(tries) == 3, "there was no deadlock"
    assert cents(engine) == [2, 2]
    assert sorted(written(engine)) == ["a", "b"]


@pytest.mark.usefixtures("accounts")
def test_serializable_transactions_that_collide_all_come_through(database_url: str) -> None:
    engine = connect(database_url, pool_size=8).execution_options(isolation_level="SERIALIZABLE")
    sessions = sessions_for(engine)
    tries = []

    def work(uow: UnitOfWork) -> None:
        tries.append(1)
        seen = uow.session.scalar(text("select sum(cents) from accounts"))
        uow.session.execute(text("update accounts set cents = :seen + 1 where name = 'a'"), {"seen": seen})
        uow.emit(a_quote("EUR", seen or 0))

    def change() -> None:
        for _ in range(5):
            run_unit_of_work(sessions, work, tries=50)

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(tries) > 20, "they never collided"
    assert cents(engine) == [20, 0]
    assert len(written(engine)) == 20
    engine.dispose()


def raise_in_postgres(uow: UnitOfWork, sqlstate: str) -> None:
    uow.session.execute(text(f"do $$ begin raise exception 'on purpose' using errcode = '{sqlstate}'; end $$"))


@pytest.mark.parametrize(("sqlstate", "tries"), [("40001", 4), ("40P01", 4), ("23505", 1), ("57P01", 1)])
def test_only_a_conflict_is_tried_again_and_not_for_ever(
    engine: Engine, sessions: sessionmaker[Session], sqlstate: str, tries: int
) -> None:
    tried = []

    def work(uow: UnitOfWork) -> None:
        tried.append(uow)
        uow.emit(a_quote())
        raise_in_postgres(uow, sqlstate)

    with pytest.raises(sqlalchemy.exc.DBAPIError):
        run_unit_of_work(sessions, work, tries=4)

    assert len(tried) == tries
    assert len({id(uow.session) for uow in tried}) == tries, "each try has a session of its own"
    assert written(engine) == []


def test_a_conflict_at_the_commit_is_tried_again_with_savepoints_and_all(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    tried: list[int] = []

    def work(uow: UnitOfWork) -> str:
        tried.append(1)
        uow.emit(a_quote("outside"))
        with uow.session.begin_nested():
            uow.emit(a_quote("inside"))
        savepoint = uow.session.begin_nested()
        uow.emit(a_quote("dropped"))
        savepoint.rollback()
        if len(tried) == 1:
            event.listen(uow.session, "before_commit", lambda _session: raise_in_postgres(uow, "40001"))
        return "done"

    assert run_unit_of_work(sessions, work) == "done"

    assert len(tried) == 2
    assert written(engine) == ["outside", "inside"]


def test_an_aggregate_that_somebody_else_changed_is_loaded_again(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    tried = []

    def work(uow: UnitOfWork) -> None:
        tried.append(1)
        uow.emit(a_quote())
        if len(tried) == 1:
            raise StaleDataError("somebody was here")

    run_unit_of_work(sessions, work)

    assert len(tried) == 2
    assert written(engine) == ["EUR"]


def test_an_async_use_case_is_retried_too(database_url: str, engine: Engine) -> None:
    tried = []

    async def use_case() -> str:
        async_engine = create_async_engine(make_url(database_url).set(drivername="postgresql+psycopg"))

        async def work(uow: UnitOfWork, session: AsyncSession) -> str:
            tried.append(session)
            uow.emit(a_quote("async"))
            if len(tried) == 1:
                await session.run_sync(lambda _: raise_in_postgres(uow, "40P01"))
            if len(tried) == 2:
                raise StaleDataError("somebody was here")
            return "done"

        try:
            return await run_unit_of_work_async(async_sessionmaker(async_engine), work)
        finally:
            await async_engine.dispose()

    assert asyncio.run(use_case()) == "done"
    assert len(tried) == 3
    assert written(engine) == ["async"]
