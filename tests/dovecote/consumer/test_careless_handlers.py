"""Handlers that end, break or change the transaction they were given: a failure that says so, and nothing is lost.

`price` 2 is the careless one's; all others only take note. Each is tried for single events and in bulk, at each place
of a bundle.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from dovecote.consumer.consumer import Consumer
from dovecote.consumer.transaction_guard import EndedTransaction
from dovecote.envelope import Envelope
from dovecote.store.bundle import Bundle
from dovecote.store.connections import driver_connection
from dovecote.unit_of_work import UnitOfWork
from tests.dovecote.consumer.test_consumer import Bench, bench
from tests.support.effects import a_route, note_as
from tests.support.quotes import a_quote

__all__ = ["bench"]

pytestmark = pytest.mark.servers

BAD = 2
Act = Callable[[UnitOfWork], object]


class Base(DeclarativeBase): ...


class Customer(Base):
    __tablename__ = "customers"
    __table_args__ = {"schema": "public"}  # noqa: RUF012  # SQLAlchemy's own way to say it
    email: Mapped[str] = mapped_column(primary_key=True)


def driver(uow: UnitOfWork) -> psycopg.Connection[Any]:
    return driver_connection(uow.session)


def run(statement: str) -> Act:
    return lambda uow: uow.session.execute(text(statement)) and None


def on_the_driver(statement: Any) -> Act:
    return lambda uow: driver(uow).execute(statement) and None


def swallow(act: Act) -> Act:
    def swallowing(uow: UnitOfWork) -> None:
        with contextlib.suppress(Exception):
            act(uow)

    return swallowing


def rolls_back_in_except(uow: UnitOfWork) -> None:
    try:
        uow.session.execute(text("select 1 / 0"))
    except DBAPIError:
        uow.session.rollback()


def flushes_what_is_known(uow: UnitOfWork) -> None:
    uow.session.add(Customer(email="old"))
    with contextlib.suppress(IntegrityError):
        uow.session.flush()


def leaves_a_savepoint_open(uow: UnitOfWork) -> None:
    uow.session.begin_nested()


def emits_and_rolls_back(uow: UnitOfWork) -> None:
    uow.emit(a_quote("dropped", 1))
    uow.session.rollback()


def rolls_back_and_commits_by_itself(uow: UnitOfWork) -> None:
    connection = driver(uow)
    connection.rollback()
    connection.execute("insert into effects (handler, price) values ('sneaked', 1)")
    with contextlib.suppress(EndedTransaction):
        connection.commit()


def commits_in_a_cursor_of_many(uow: UnitOfWork) -> None:
    with driver(uow).cursor() as cursor:
        cursor.executemany("commit", [()])


def commits_in_a_stream(uow: UnitOfWork) -> None:
    for _ in driver(uow).cursor().stream("commit"):
        pass


def commits_as_a_context(uow: UnitOfWork) -> None:
    with driver(uow):
        pass


def commits_in_a_cursor_of_the_server(uow: UnitOfWork) -> None:
    with driver(uow).cursor("named") as cursor:
        cursor.execute("select 1; commit; begin")


def leaves_a_stream_open(uow: UnitOfWork) -> None:
    uow.session.info["stream"] = stream = driver(uow).cursor().stream("select generate_series(1, 100000)")
    next(stream)


def asks_for_another_level(uow: UnitOfWork) -> None:
    uow.session.connection(execution_options={"isolation_level": "SERIALIZABLE"})


def sets_by_a_parameter(uow: UnitOfWork) -> None:
    uow.session.execute(text("select set_config(:name, '7', true)"), {"name": "app.tenant"})


CARELESS: dict[str, tuple[Act, str]] = {
    "session.rollback()": (lambda uow: uow.session.rollback(), "rolled back"),
    "rollback in except": (rolls_back_in_except, "caught an error of the database and rolled back"),
    "emit, then rollback": (emits_and_rolls_back, "rolled back"),
    "session.connection().rollback()": (lambda uow: uow.session.connection().rollback(), "rolled back"),
    "driver.rollback()": (lambda uow: driver(uow).rollback(), "rolled back"),
    "rollback, then a commit on the driver": (rolls_back_and_commits_by_itself, "rolled back"),
    "SQL rollback": (run("rollback"), "said `rollback` in SQL"),
    "SQL abort": (on_the_driver("ABORT"), "said `abort` in SQL"),
    "SQL rollback to a strange savepoint": (
        on_the_driver("rollback to savepoint other"),
        "rolled back to the savepoint 'other'",
    ),
    "swallowed error": (swallow(run("select 1 / 0")), "caught an error of the database and went on"),
    "swallowed error in a flush": (flushes_what_is_known, "caught an error of the database and rolled back"),
    "swallowed error on the driver": (swallow(on_the_driver("select 1 / 0")), "caught an error of the database"),
    "session.commit()": (lambda uow: uow.session.commit(), "committed"),
    "session.commit(), swallowed": (swallow(lambda uow: uow.session.commit()), "committed"),
    "session.connection().commit()": (lambda uow: uow.session.connection().commit(), "committed"),
    "driver.commit()": (lambda uow: driver(uow).commit(), "committed"),
    "driver.commit(), swallowed": (swallow(lambda uow: driver(uow).commit()), "committed"),
    "with driver:": (commits_as_a_context, "committed"),
    "SQL commit": (run("commit"), "said `commit` in SQL"),
    "SQL commit, swallowed": (swallow(run("commit")), "said `commit` in SQL"),
    "SQL END": (run("/* done */ END"), "said `end` in SQL"),
    "SQL commit; begin": (run("commit; begin"), "said `commit` in SQL"),
    "SQL in between": (on_the_driver("select 1; -- it's\n commit; begin"), "said `commit` in SQL"),
    "SQL in bytes": (on_the_driver(b"commit; begin"), "said `commit` in SQL"),
    "SQL composed": (on_the_driver(sql.SQL("{}; begin").format(sql.SQL("commit"))), "said `commit` in SQL"),
    "exec_driver_sql": (lambda uow: uow.session.connection().exec_driver_sql("commit; begin"), "said `commit` in SQL"),
    "executemany": (commits_in_a_cursor_of_many, "said `commit` in SQL"),
    "stream": (commits_in_a_stream, "said `commit` in SQL"),
    "server cursor": (commits_in_a_cursor_of_the_server, "said `commit` in SQL"),
    "SQL prepare transaction": (run("prepare transaction 'x'"), "said `prepare transaction` in SQL"),
    "SQL begin": (run("begin"), "said `begin` in SQL"),
    "SQL start transaction": (run("start transaction"), "said `start` in SQL"),
    "session.close()": (lambda uow: uow.session.close(), "rolled back"),
    "session.reset()": (lambda uow: uow.session.reset(), "rolled back"),
    "session.invalidate()": (lambda uow: uow.session.invalidate(), "closed its connection"),
    "driver.close()": (lambda uow: driver(uow).close(), "closed its connection"),
    "savepoint left open": (leaves_a_savepoint_open, "left a savepoint open"),
    "SQL savepoint left open": (run("savepoint mine"), "left a savepoint open"),
    "statement left open": (leaves_a_stream_open, "left a statement unfinished"),
    "another isolation level": (asks_for_another_level, "asked for another isolation level"),
    "another isolation level, swallowed": (swallow(asks_for_another_level), "asked for another isolation level"),
    "set local": (run("set local statement_timeout = '7s'"), "left statement_timeout set"),
    "set": (run("set work_mem = '7MB'"), "left work_mem set"),
    "set_config": (run("select set_config('lock_timeout', '7s', true)"), "left lock_timeout set"),
    "set_config by a parameter": (sets_by_a_parameter, "left app.tenant set"),
    "set local of a custom name": (run("set local app.tenant = '7'"), "left app.tenant set"),
    "set role": (run("set local role pg_monitor"), "left role set"),
    "set transaction": (run("set transaction read only"), "left transaction_read_only set"),
    "set session characteristics": (
        run("set session characteristics as transaction read only"),
        "left default_transaction_read_only set",
    ),
    "reset": (run("reset timezone; set timezone = 'CET'"), "left TimeZone set"),
    "do block": (run("do $$ begin perform set_config('work_mem', '7MB', true); end $$"), "left work_mem set"),
}


def driver_settings(name: str, value: Any) -> Act:
    return lambda uow: setattr(driver(uow), name, value)


# They are errors by themselves, and nothing has happened then.
REFUSED_BY_OTHERS: dict[str, Act] = {
    "driver.autocommit": driver_settings("autocommit", True),
    "driver.isolation_level": driver_settings("isolation_level", psycopg.IsolationLevel.SERIALIZABLE),
    "driver.read_only": driver_settings("read_only", True),
    "connection.execution_options()": lambda uow: uow.session.connection().execution_options(
        isolation_level="AUTOCOMMIT"
    ),
    "session.begin()": lambda uow: uow.session.begin(),
    "discard all": run("discard all"),
    "procedure that commits": run("do $$ begin commit; end $$"),
}


def known_already(uow: UnitOfWork) -> None:
    with contextlib.suppress(IntegrityError), uow.session.begin_nested():
        uow.session.execute(text("insert into public.customers values ('old')"))


def savepoints_of_all_kinds(uow: UnitOfWork) -> None:
    with uow.session.begin_nested(), uow.session.begin_nested():
        uow.session.execute(text("select 1"))
    with uow.session.connection().begin_nested() as savepoint:
        savepoint.rollback()
    with driver(uow).transaction():
        driver(uow).execute("select 1")
    uow.session.execute(text("savepoint outer_one; savepoint inner_one; rollback to outer_one; release outer_one"))
    with contextlib.suppress(DBAPIError), uow.session.begin_nested():
        uow.session.execute(text("savepoint lost; select 1 / 0"))


def sessions_of_its_own(uow: UnitOfWork) -> None:
    bind = uow.session.get_bind()
    assert not isinstance(bind, Connection)
    with bind.connect() as connection:
        connection.execute(text("set lock_timeout = '7s'"))
        connection.execute(text("select 1"))
        connection.commit()
        with contextlib.suppress(DBAPIError):
            connection.execute(text("select 1 / 0"))
        connection.rollback()
    with bind.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("select 1"))


def puts_it_back(uow: UnitOfWork) -> None:
    uow.session.execute(text("set local statement_timeout = '7s'"))
    uow.session.execute(text("select set_config('app.tenant', '7', true)"))
    uow.session.execute(text("set local statement_timeout = '30s'"))
    uow.session.execute(text("select set_config('app.tenant', '', true)"))


def sets_in_a_savepoint(uow: UnitOfWork) -> None:
    savepoint = uow.session.begin_nested()
    uow.session.execute(text("set local role pg_monitor"))
    savepoint.rollback()


def reads_from_a_server_cursor(uow: UnitOfWork) -> None:
    found = uow.session.execute(text("select generate_series(1, 10)"), execution_options={"stream_results": True})
    assert len(found.all()) == 10
    with driver(uow).cursor().copy("copy (select 1) to stdout") as rows:
        assert list(rows)


ALLOWED: dict[str, Act] = {
    "begin_nested() around what fails": known_already,
    "savepoints": savepoints_of_all_kinds,
    "expunge_all()": lambda uow: uow.session.expunge_all(),
    "connections of its own": sessions_of_its_own,
    "a setting put back": puts_it_back,
    "a setting in a savepoint": sets_in_a_savepoint,
    "set constraints": run("set constraints all deferred"),
    "words in literals": run("select '; commit', $$; rollback$$, E'\\'; begin' -- ; commit\n /* ; /* set */ commit */"),
    "streams": reads_from_a_server_cursor,
    "emit": lambda uow: uow.emit(a_quote("dropped", 1)),
    "orm": lambda uow: uow.session.add(Customer(email=str(uow.session.scalar(text("select gen_random_uuid()"))))),
}


@pytest.fixture(autouse=True)
def customers(bench: Bench) -> None:
    Base.metadata.create_all(bench.engine)
    with bench.engine.begin() as connection:
        connection.execute(text("insert into public.customers values ('old')"))


def handler(name: str, careless: Act, bulk: bool) -> Any:
    def one(event: Any, uow: UnitOfWork, _gateways: object) -> None:
        note_as(name, event, uow)
        if event.price == BAD:
            careless(uow)

    def all_of_them(envelopes: Sequence[Envelope], uow: UnitOfWork, _gateways: object) -> None:
        for envelope in envelopes:
            note_as(name, envelope.event, uow)  # type: ignore[arg-type]  # a quote
        if any(envelope.event.price == BAD for envelope in envelopes):  # type: ignore[attr-defined]  # a quote
            careless(uow)

    return all_of_them if bulk else one


def prices_by(bench: Bench, name: str) -> list[int]:
    with bench.engine.connect() as connection:
        query = text("select price from effects where handler = :name order by price")
        return list(connection.scalars(query, {"name": name}))


def marks_of(bench: Bench, name: str) -> int:
    with bench.engine.connect() as connection:
        query = text("select count(*) from dovecote.processed_events where handler_name = :name")
        return int(connection.scalar(query, {"name": name}) or 0)


def failures_of(bench: Bench, name: str) -> list[tuple[str, int, str, str]]:
    with bench.engine.connect() as connection:
        query = text("select state, attempts, error_type, error from dovecote.deliveries where handler_name = :name")
        return [tuple(row) for row in connection.execute(query, {"name": name})]


PLACES = {"alone": [2], "first": [2, 3, 4, 5], "middle": [1, 3, 2, 4, 5], "last": [1, 3, 4, 2]}


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("what", CARELESS)
def test_what_a_handler_does_to_its_transaction_is_its_failure_and_its_mates_go_through(
    bench: Bench, what: str, bulk: bool
) -> None:
    careless, words = CARELESS[what]
    for place, prices in PLACES.items():
        name = f"test.{place}"

        bench.consumer.consume(Bundle(a_route(name, handler(name, careless, bulk), bulk=bulk), bench.write(*prices)))

        good = sorted(set(prices) - {BAD})
        assert prices_by(bench, name) == good, place
        assert marks_of(bench, name) == len(good), place
        ((state, attempts, error_type, error),) = failures_of(bench, name)
        assert (state, attempts, error_type) == ("retrying", 1, "EndedTransaction"), error
        assert f"{name} {words}" in error
    assert prices_by(bench, "sneaked") == []
    assert all(envelope.aggregate_id != "dropped" for envelope in bench.envelopes())


@pytest.mark.once
@pytest.mark.parametrize("ordered", [False, True], ids=["in any order", "in order"])
@pytest.mark.parametrize("what", ["session.rollback()", "swallowed error", "session.commit()", "SQL commit; begin"])
def test_it_is_tried_again_on_its_schedule_and_then_dead(bench: Bench, what: str, ordered: bool) -> None:
    careless, _ = CARELESS[what]
    route = a_route(function=handler("test.note", careless, False), max_attempts=3, ordered=ordered)

    bench.consumer.consume(Bundle(route, [*bench.write(1, 2), *bench.write(3, symbol="USD")]))
    while bench.retry(route):
        pass

    assert sorted(bench.effects()) == [("EUR", 1), ("USD", 3)]
    ((state, attempts, _, _),) = failures_of(bench, "test.note")
    assert (state, attempts) == ("dead", 3)


@pytest.mark.once
@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("what", ["session.rollback()", "swallowed error", "session.commit()", "SQL commit; begin"])
def test_in_a_replay_it_fails_for_that_replay(bench: Bench, what: str, bulk: bool) -> None:
    careless, _ = CARELESS[what]
    written = bench.write(1, 2, 3)
    bench.consumer.consume(Bundle(a_route(), written))
    replay = bench.replay_again()

    route = a_route(function=handler("test.note", careless, bulk), bulk=bulk)
    bench.consumer.consume(Bundle(route, written, replay=replay))

    assert prices_by(bench, "test.note") == [1, 1, 2, 3, 3]
    ((state, attempts, error_type, _),) = failures_of(bench, "test.note")
    assert (state, attempts, error_type) == ("retrying", 1, "EndedTransaction")
    bench.consumer.consume(Bundle(a_route(), written[1:2], retry=True, replay=replay))
    assert prices_by(bench, "test.note") == [1, 1, 2, 2, 3, 3]
    assert failures_of(bench, "test.note") == []


@pytest.mark.once
@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("what", REFUSED_BY_OTHERS)
def test_what_the_driver_or_sqlalchemy_refuses_is_a_failure_and_leaves_nothing(
    bench: Bench, what: str, bulk: bool
) -> None:
    route = a_route(function=handler("test.note", REFUSED_BY_OTHERS[what], bulk), bulk=bulk)

    bench.consumer.consume(Bundle(route, bench.write(1, 2, 3)))

    assert prices_by(bench, "test.note") == [1, 3]
    assert [state for state, *_ in failures_of(bench, "test.note")] == ["retrying"]


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("what", ALLOWED)
def test_what_leaves_the_transaction_whole_is_allowed(bench: Bench, what: str, bulk: bool) -> None:
    for place, prices in PLACES.items():
        name = f"test.{place}"

        bench.consumer.consume(
            Bundle(a_route(name, handler(name, ALLOWED[what], bulk), bulk=bulk), bench.write(*prices))
        )

        assert failures_of(bench, name) == []
        assert prices_by(bench, name) == sorted(prices)


def test_a_connection_that_a_careless_handler_had_is_as_good_as_new(bench: Bench) -> None:
    for careless, _ in CARELESS.values():
        bench.consumer.consume(Bundle(a_route(function=handler("test.note", careless, False)), bench.write(BAD)))

    # As many as the pool may hold: each is taken.
    connections = [bench.engine.connect() for _ in range(25)]
    try:
        for connection in connections:
            raw = connection.connection.driver_connection
            assert isinstance(raw, psycopg.Connection)
            assert raw.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            assert connection.scalar(text("show statement_timeout")) == "30s"
            connection.commit()
    finally:
        for connection in connections:
            connection.close()
    assert bench.effects() == []


def test_a_conflict_that_is_passed_over_is_still_a_conflict(bench: Bench) -> None:
    calls = []

    def passes_it_over(event: Any, uow: UnitOfWork, _gateways: object) -> None:
        calls.append(event)
        note_as("test.note", event, uow)
        if len(calls) < 3:
            with contextlib.suppress(DBAPIError):
                uow.session.execute(text("do $$ begin raise exception 'again' using errcode = '40001'; end $$"))

    bench.consumer.consume(Bundle(a_route(function=passes_it_over), bench.write(1)))

    assert bench.effects() == [("EUR", 1)]
    assert bench.deliveries() == []


def test_a_connection_lost_and_passed_over_spends_no_attempt(bench: Bench) -> None:
    calls = []

    def passes_it_over(event: Any, uow: UnitOfWork, _gateways: object) -> None:
        calls.append(event)
        note_as("test.note", event, uow)
        if len(calls) == 1:
            with contextlib.suppress(DBAPIError):
                uow.session.execute(text("select pg_terminate_backend(pg_backend_pid())"))

    bench.consumer.consume(Bundle(a_route(function=passes_it_over), bench.write(1)))

    assert bench.effects() == [("EUR", 1)]
    assert bench.deliveries() == []


def test_a_setting_of_another_event_is_blamed_on_the_one_that_set_it(bench: Bench) -> None:
    def second_sets(event: Any, uow: UnitOfWork, _gateways: object) -> None:
        puts_it_back(uow)
        if event.price == BAD:
            uow.session.execute(text("set local work_mem = '7MB'"))
        note_as("test.note", event, uow)

    bench.consumer.consume(Bundle(a_route(function=second_sets), bench.write(1, 2, 3)))

    assert bench.effects() == [("EUR", 1), ("EUR", 3)]


def test_a_caller_that_passes_over_an_error_hears_of_it_at_the_commit(bench: Bench) -> None:
    def careless() -> None:
        with bench.engine.begin() as connection:
            connection.execute(text("insert into public.customers values ('new')"))
            with contextlib.suppress(DBAPIError):
                connection.execute(text("select 1 / 0"))

    with pytest.raises(DBAPIError, match="cannot be committed"):
        careless()

    with bench.engine.connect() as connection:
        assert connection.scalar(text("select count(*) from public.customers")) == 1


@pytest.mark.parametrize("what", ["session.rollback()", "swallowed error", "session.close()", "savepoint left open"])
def test_on_an_engine_of_somebody_else_s_it_is_noticed_after_the_call(bench: Bench, what: str) -> None:
    engine = create_engine(make_url(bench.url).set(drivername="postgresql+psycopg"))
    consumer = Consumer(sessionmaker(engine, expire_on_commit=False), bench.gateways, keyring=bench.gateways.keyring)

    consumer.consume(Bundle(a_route(function=handler("test.note", CARELESS[what][0], False)), bench.write(1, 2, 3)))

    engine.dispose()
    assert prices_by(bench, "test.note") == [1, 3]
    assert [error_type for _, _, error_type, _ in failures_of(bench, "test.note")] == ["EndedTransaction"]


# Handlers that return something ------------------------------------------------------------------


async def later() -> None:
    await asyncio.sleep(0)


def generated() -> Any:
    yield 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (later, "test.note returned a coroutine, which nobody awaits"),
        (generated, "test.note returned a generator, whose body never ran"),
        (lambda: True, "test.note returned a bool"),
        (list, "test.note returned a list"),
    ],
)
@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.filterwarnings("error::RuntimeWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_handler_that_returns_something_has_failed(
    bench: Bench, returned: Callable[[], object], words: str, bulk: bool
) -> None:
    def one(event: Any, uow: UnitOfWork, _gateways: object) -> object:
        note_as("test.note", event, uow)
        return returned() if event.price == BAD else None

    def all_of_them(envelopes: Sequence[Any], uow: UnitOfWork, _gateways: object) -> object:
        answers = [one(envelope.event, uow, None) for envelope in envelopes]
        return next((answer for answer in answers if answer is not None), None)

    bench.consumer.consume(Bundle(a_route(function=all_of_them if bulk else one, bulk=bulk), bench.write(1, 2, 3)))

    assert bench.effects() == [("EUR", 1), ("EUR", 3)]
    ((_, _, error_type, error),) = failures_of(bench, "test.note")
    assert error_type == "ReturnedValue"
    assert words in error
