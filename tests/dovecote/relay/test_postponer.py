"""A full queue keeps its own handler's events in the outbox and nobody else's; later they come, all, in order, once."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dramatiq
import psycopg
import pytest
from sqlalchemy import text

from domain.pricing import PriceQuoted
from dovecote.broker.publisher import RedisUsage
from dovecote.errors import NewerRelay
from dovecote.operations import doctor
from dovecote.operations.handlers import pause, resume
from dovecote.operations.replay_plans import Request
from dovecote.operations.replays import start
from dovecote.relay.bundler import Bundler
from dovecote.relay.postponer import Postponer
from dovecote.route import Route, queues
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, each_once, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import eventually
from tests.support.quotes import a_quote
from tests.support.system import System, system_for
from workers.gateways import Gateways

pytestmark = pytest.mark.servers

BOUND = 1_000_000
# About 480 bytes each in a message: so many fill a queue of that bound more than twice.
MANY = 5_000

UP = a_route("test.up", queue="up")
DOWN = a_route("test.down", queue="down", ordered=True, replayable=True)

SystemWith = Callable[..., System]


@pytest.fixture
def system_with(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[SystemWith]:
    """Builds this test's system, whose queues take a megabyte each."""
    with ExitStack() as stack:

        def build(*routes: Route, **variables: str) -> System:
            given = {"DOVECOTE_RELAY__QUEUE_BYTES": str(BOUND), "DOVECOTE_RELAY__BATCH_SIZE": "500", **variables}
            settings = settings_for(fresh_database_url, servers.redis_url, tmp_path, **given)
            system = stack.enter_context(system_for(settings, routes or (UP, DOWN)))
            make_room_for_effects(system.engine)
            return system

        yield build


@contextmanager
def workers_of(system: System, *names: str, threads: int = 2) -> Iterator[None]:
    worker = dramatiq.Worker(system.broker, queues=set(names), worker_threads=threads, worker_timeout=100)
    worker.start()
    try:
        yield
    finally:
        worker.stop(timeout=20_000)


def one_worker(system: System) -> AbstractContextManager[None]:
    """One thread for all queues: what it is sent in order, it acts on in order, and parks nothing."""
    return workers_of(system, *queues(system.routes), threads=1)


def write_many(system: System, events: int = MANY, first: int = 0) -> None:
    """Write quotes of so many prices, in hundreds of aggregates by turns."""
    for start_at in range(first, first + events, 500):
        with unit_of_work(system.sessions) as uow:
            for price in range(start_at, start_at + 500):
                uow.emit(a_quote(f"S{price % 500}", price))


def prices_of(system: System, handler: str) -> list[int]:
    return [one.price for one in effects_in(system.engine) if one.handler == handler]


def is_in_order(system: System, handler: str) -> bool:
    """Whether the prices of each symbol only rise."""
    last: dict[str, int] = {}
    for one in effects_in(system.engine):
        if one.handler == handler:
            if one.price < last.get(one.symbol, -1):
                return False
            last[one.symbol] = one.price
    return True


def one_value(system: System, query: str) -> Any:
    with system.engine.connect() as connection:
        return connection.scalar(text(query))


def postponed(system: System) -> list[str]:
    with system.engine.connect() as connection:
        return list(connection.scalars(text("select handler_name from dovecote.postponed order by 1")))


def bytes_of(system: System, queue: str) -> int:
    return int(system.broker.client.memory_usage(f"{system.settings.redis.namespace}:{queue}.msgs", samples=0) or 0)


def messages_of(system: System, queue: str) -> int:
    return int(system.broker.client.hlen(f"{system.settings.redis.namespace}:{queue}.msgs"))


def wipe(system: System) -> None:
    script = "for _, key in ipairs(redis.call('keys', ARGV[1])) do redis.call('del', key) end"
    system.broker.client.eval(script, 0, f"{system.settings.redis.namespace}:*")


def is_published(system: System) -> bool:
    return system.status().relay.lag_events == 0


# Others go on -------------------------------------------------------------------------------------


def test_a_queue_without_consumers_stops_only_its_own_handler(system_with: SystemWith) -> None:
    system = system_with()
    with system.relay():
        with workers_of(system, "up"):
            write_many(system)
            eventually(lambda: len(prices_of(system, "test.up")) == MANY, 30, "all effects of the other handler")
            eventually(lambda: is_published(system), 10, "all in batches")
            assert postponed(system) == ["test.down"]
            assert bytes_of(system, "down") < 1.5 * BOUND
        with one_worker(system):
            system.until_quiet(60)
            eventually(lambda: postponed(system) == [], 10, "a handler that is live again")

            write_quotes(system, [MANY])
            system.until_quiet()
    assert sorted(prices_of(system, "test.up")) == list(range(MANY + 1))
    assert sorted(prices_of(system, "test.down")) == list(range(MANY + 1))
    assert is_in_order(system, "test.down")


def test_no_queue_takes_more_than_its_share_of_what_redis_has_room_for(system_with: SystemWith) -> None:
    system = system_with(DOVECOTE_RELAY__QUEUE_BYTES="268435456")
    client: Any = system.broker.client
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 5_000_000)
    try:
        with system.relay(), workers_of(system, "up"):
            write_many(system, 16_000)  # 6 MB for each queue
            eventually(lambda: len(prices_of(system, "test.up")) == 16_000, 90, "all effects of the other handler")
            assert postponed(system) == ["test.down"]
    finally:
        client.config_set("maxmemory", 0)


# Nothing is lost ----------------------------------------------------------------------------------


@pytest.mark.once
def test_redis_and_relay_may_forget_while_a_handler_is_postponed(system_with: SystemWith) -> None:
    system = system_with()
    with system.relay():
        write_many(system)
        eventually(lambda: is_published(system), 20, "all in batches")
        wipe(system)
        eventually(lambda: messages_of(system, "down") > 0, 10, "what was sent, once more")
        assert bytes_of(system, "down") < 1.5 * BOUND, "and no more than was sent"
    with system.relay(), one_worker(system):
        system.until_quiet(60)
        assert sorted(prices_of(system, "test.up")) == list(range(MANY))
        assert sorted(prices_of(system, "test.down")) == list(range(MANY))
        assert is_in_order(system, "test.down")


@pytest.mark.once
def test_a_writer_that_dawdles_while_a_handler_is_postponed_is_heard(system_with: SystemWith) -> None:
    system = system_with()
    write = "select dovecote.append_event('price', %s, 'pricing.price_quoted.v1', %s)"
    quote = '{"symbol": "%s", "price": "%d", "as_of": "2026-11-20T12:00:00Z", "occurred_at": "2026-11-20T12:00:00Z"}'
    url = system.settings.database.url.get_secret_value()
    with psycopg.connect(url) as early, psycopg.connect(url) as late:
        early.execute(write, ("EARLY", quote % ("EARLY", 1)))
        with system.relay():
            write_many(system, 4_000)
            eventually(lambda: postponed(system) == ["test.down", "test.up"], 20, "full queues")
            late.execute(write, ("LATE", quote % ("LATE", 2)))
            write_many(system, 1_000, first=4_000)
            eventually(lambda: one_value(system, "select count(*) from dovecote.published_batches") > 9, 10, "batches")
            early.commit()
            with one_worker(system):
                eventually(lambda: len(prices_of(system, "test.down")) > 4_500, 60, "most of it")
                late.commit()
                system.until_quiet(60)
                eventually(lambda: postponed(system) == [], 10, "live handlers")
    symbols = [one.symbol for one in effects_in(system.engine) if one.handler == "test.down"]
    assert {"EARLY", "LATE"} <= set(symbols)
    assert len(symbols) == 5_002
    assert each_once(effects_in(system.engine))


@pytest.mark.once
@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_nothing_is_lost_doubled_or_out_of_order(system_with: SystemWith, seed: int) -> None:
    chance = random.Random(seed)
    system = system_with(DOVECOTE_RELAY__BATCH_SIZE=str(chance.choice([50, 500])))
    with ExitStack() as stack:
        relay = stack.enter_context(ExitStack())
        relay.enter_context(system.relay())
        written = 0
        for _ in range(14):
            match chance.choice(["write", "write", "write", "restart", "terminate", "wipe", "consume"]):
                case "write":
                    events = chance.choice([1, 500, 1_500])
                    with unit_of_work(system.sessions) as uow:
                        for price in range(written, written + events):
                            uow.emit(a_quote(f"S{price % 50}", price))
                    written += events
                case "restart":
                    relay.close()
                    relay.enter_context(system.relay())
                case "terminate":
                    one_value(
                        system,
                        "select pg_terminate_backend(pid) from pg_stat_activity"
                        " where application_name = 'dovecote relay' and datname = current_database() limit 1",
                    )
                case "wipe":
                    wipe(system)
                case "consume":
                    with one_worker(system):
                        time.sleep(chance.uniform(0.05, 0.5))  # so far, and no further
        stack.enter_context(one_worker(system))
        system.until_quiet(90)
        eventually(lambda: postponed(system) == [], 10, "no handler that is postponed")
    for handler in ("test.up", "test.down"):
        assert sorted(prices_of(system, handler)) == list(range(written))
    assert is_in_order(system, "test.down")


# What waits with it -------------------------------------------------------------------------------


@pytest.mark.once
def test_what_is_held_for_a_paused_handler_is_no_burden_to_others_on_its_queue(system_with: SystemWith) -> None:
    paused, other = a_route("test.paused", queue="both"), a_route("test.other", queue="both")
    system = system_with(paused, other)

    def has_acted_on(events: int) -> bool:
        return len(prices_of(system, "test.other")) == events

    pause(system.engine, system.routes, "test.paused", actor="me", reason="a test")
    with system.running():
        for part in range(4):
            write_many(system, MANY // 2, first=part * MANY // 2)
            eventually(partial(has_acted_on, (part + 1) * MANY // 2), 30, "effects")
        eventually(lambda: postponed(system) == ["test.paused"], 10, "only what is paused")

        resume(system.engine, system.routes, "test.paused", actor="me")
        system.until_quiet(60)
    assert sorted(prices_of(system, "test.paused")) == list(range(2 * MANY))
    assert sorted(prices_of(system, "test.other")) == list(range(2 * MANY))


@pytest.mark.once
def test_retries_and_replays_wait_for_room(system_with: SystemWith) -> None:
    fails = {"times": 2}  # with its bundle, and alone

    def act(quote: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        if quote.price == -1 and fails["times"]:
            fails["times"] -= 1
            raise RuntimeError("twice")
        note_as("test.down", quote, uow)

    system = system_with(
        a_route("test.down", function=act, queue="down", replayable=True, backoff_seconds=9, max_backoff_seconds=9)
    )
    with system.relay():
        with one_worker(system):
            write_quotes(system, [-2, -1])
            eventually(lambda: system.status().handlers["test.down"].retrying == 1, 10, "a retry")
        write_many(system)
        eventually(lambda: postponed(system) == ["test.down"], 20, "a full queue")
        asked = Request(handler="test.down", mode="reprocess", reason="a test", actor="me")
        start(system.engine, system.routes, asked)
        queued = messages_of(system, "down")
        due = "select next_attempt_at < now() - interval '1.5 s' and leased_until is null from dovecote.deliveries"
        eventually(lambda: one_value(system, due), 20, "a retry that is due and was not sent")
        assert messages_of(system, "down") == queued

        with one_worker(system):
            system.until_quiet(60)
            eventually(lambda: prices_of(system, "test.down").count(-2) == 2, 20, "the replay")
            assert prices_of(system, "test.down").count(-1) == 1


def test_a_relay_that_was_replaced_postpones_nobody(system_with: SystemWith) -> None:
    system = system_with()
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        postponer = a_postponer(connection, system.routes, epoch=7)
        postponer.measured(RedisUsage(used=0, maxmemory=0, queued={"down": BOUND}, held={}))

        with pytest.raises(NewerRelay):
            postponer.admit([(1, "pricing.price_quoted.v1", b"{}")])

    assert postponed(system) == []


def a_postponer(connection: psycopg.Connection[Any], routes: Sequence[Route], epoch: int) -> Postponer:
    return Postponer(
        records=connection,
        bundler=Bundler(routes),
        routes=routes,
        epoch=epoch,
        queue_bytes=BOUND,
        batch_size=100,
        published_upto=0,
        send=lambda _made: None,
        record_unreadable=lambda _rows: None,
    )


# What people see ----------------------------------------------------------------------------------


@pytest.mark.once
def test_doctor_says_which_handler_is_postponed(system_with: SystemWith) -> None:
    system = system_with()
    with system.relay():
        write_many(system)
        eventually(lambda: postponed(system) == ["test.down", "test.up"], 20, "full queues")

        found = {one.check: one for one in doctor.examine(system.settings, system.routes).findings}

    finding = found["queues.postponed"]
    assert finding.level == "warning"
    assert "test.down" in finding.found
    assert "bytes" in finding.found
    assert "DOVECOTE_RELAY__QUEUE_BYTES" in finding.advice
