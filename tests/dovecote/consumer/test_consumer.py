"""A bundle of events is acted on once, whatever fails; what fails is retried, then dead-lettered with its cause."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
import psycopg
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import Engine, make_url, text
from sqlalchemy.event import listen
from sqlalchemy.orm import Session, sessionmaker
from structlog.testing import capture_logs

from domain.pricing import PriceQuoted
from dovecote.bootstrap import consumer_engine
from dovecote.consumer.consumer import Consumer
from dovecote.consumer.retrying import Stopping
from dovecote.envelope import Envelope, read_envelope
from dovecote.errors import GatewayUnavailable, NotFound, Refused
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.store import leases
from dovecote.store.bundle import Bundle
from dovecote.store.connections import connect, sessions_for
from dovecote.store.deliveries import Deliveries
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.chaos.commits import PostgresProxy
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as
from tests.support.processes import eventually
from tests.support.quotes import a_quote
from workers.gateways import Gateways, gateways_for

pytestmark = pytest.mark.servers

APPLICATION = "dovecote test consumer"


@dataclass(frozen=True)
class Delivery:
    symbol: str
    position: int
    state: str
    attempts: int
    pause_seconds: float | None
    error_type: str | None
    error: str | None


@dataclass
class Bench:
    """A consumer on a database of its own; the relay's part is played by `retry`."""

    url: str
    engine: Engine
    sessions: sessionmaker[Session]
    gateways: Gateways
    stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.consumer = Consumer(
            self.sessions, self.gateways, self.stopping, outage_max_backoff_seconds=0.05, keyring=self.gateways.keyring
        )

    def write(self, *prices: int, symbol: str = "EUR") -> list[Envelope]:
        """Write quotes in one transaction; return the envelopes of exactly these."""
        quotes = [a_quote(symbol, price) for price in prices]
        with unit_of_work(self.sessions) as uow:
            for quote in quotes:
                uow.emit(quote)
        return self.envelopes("where id = any(:ids)", ids=[quote.event_id for quote in quotes])

    def rename(self, envelopes: Sequence[Envelope]) -> None:
        """Give events the type that their envelopes have, as if newer code had written them."""
        with self.engine.begin() as connection:
            connection.execute(
                text("update dovecote.outbox set event_type = :type where id = :id"),
                [{"type": envelope.type, "id": envelope.event_id} for envelope in envelopes],
            )

    def envelopes(self, where: str = "", **parameters: object) -> list[Envelope]:
        with self.engine.connect() as connection:
            query = text(f"select dovecote.envelope(o) from dovecote.outbox o {where} order by position")
            return [read_envelope(orjson.loads(row)) for row in connection.scalars(query, parameters)]

    def retry(self, route: Route) -> int:
        """Send every retry now, whenever it is due; return how many there were."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("update dovecote.deliveries set next_attempt_at = now() where state = 'retrying'")
            due = leases.lease_due(connection, 1_000, 60, [route])
        envelopes = [read_envelope(orjson.loads(one.envelope)) for one in due]
        if envelopes:
            self.consumer.consume(Bundle(route, envelopes, retry=True))
        return len(envelopes)

    def replay_again(self) -> UUID:
        """Ask that `test.note` act again on everything; return the replay, whose messages the test sends."""
        with self.engine.begin() as connection:
            query = """
                insert into dovecote.replays (actor, reason, mode, handler_name, filter)
                values ('tester', 'a test', 'reprocess', 'test.note', '{}') returning id
            """
            id: UUID = connection.scalar(text(query))
            return id

    def release_unblocked(self, route: Route) -> int:
        with psycopg.connect(self.url, autocommit=True) as connection:
            return leases.release_unblocked(connection, route)

    def deliveries(self) -> list[Delivery]:
        with self.engine.connect() as connection:
            found = connection.execute(
                text(
                    """
                    select aggregate_id, position, state, attempts,
                           extract(epoch from next_attempt_at - updated_at)::float, error_type, error
                    from dovecote.deliveries order by position
                    """
                )
            )
            return [Delivery(*row) for row in found]

    def discard(self, price: int) -> None:
        with self.engine.begin() as connection:
            connection.execute(
                text(
                    "update dovecote.deliveries d set state = 'discarded', next_attempt_at = null"
                    " from dovecote.outbox o where o.id = d.event_id and o.payload ->> 'price' = :price"
                ),
                {"price": str(price)},
            )

    def states(self) -> list[tuple[str, str]]:
        return [(delivery.symbol, delivery.state) for delivery in self.deliveries()]

    def effects(self) -> list[tuple[str, int]]:
        return [(effect.symbol, effect.price) for effect in effects_in(self.engine)]


@pytest.fixture
def bench(fresh_database_url: str, settings: Settings) -> Iterator[Bench]:
    engine = connect(fresh_database_url, pool_size=25, application_name=APPLICATION)
    make_room_for_effects(engine)
    yield Bench(fresh_database_url, engine, sessions_for(engine), gateways_for(settings))
    engine.dispose()


class Failing:
    """A handler that fails for some prices, a number of times each, before it takes note."""

    def __init__(self, failures: dict[int, int], error: Callable[[], Exception] = RuntimeError) -> None:
        self._left, self._error = dict(failures), error
        self.calls: list[int] = []

    def __call__(self, event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        price = int(event.price)
        self.calls.append(price)
        note_as("test.note", event, uow)
        if self._left.get(price, 0) > 0:
            self._left[price] -= 1
            raise self._error()


FOR_EVER = 1_000_000


# Once ---------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize("bulk", [False, True])
def test_twenty_workers_with_the_same_bundle_act_on_it_once(bench: Bench, bulk: bool) -> None:
    def note_all(envelopes: Sequence[Envelope], uow: UnitOfWork, _gateways: object) -> None:
        for envelope in envelopes:
            assert isinstance(envelope.event, PriceQuoted)
            note_as("test.note", envelope.event, uow)

    route = a_route(function=note_all, bulk=True) if bulk else a_route()
    bundle = bench.write(*range(30))
    workers = [threading.Thread(target=bench.consumer.consume, args=(Bundle(route, bundle),)) for _ in range(20)]

    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert bench.effects() == [("EUR", price) for price in range(30)]
    assert bench.deliveries() == []


def test_bundles_that_overlap_in_different_order_act_once(bench: Bench) -> None:
    written = bench.write(*range(30))
    bundles = [written[start::step] for start in range(3) for step in (1, 2, 3)]
    workers = [threading.Thread(target=bench.consumer.consume, args=(Bundle(a_route(), bundle),)) for bundle in bundles]

    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert sorted(bench.effects()) == [("EUR", price) for price in range(30)]


def test_an_event_twice_in_one_bundle_is_acted_on_once(bench: Bench) -> None:
    bundle = bench.write(1, 2)

    bench.consumer.consume(Bundle(a_route(), [*bundle, *bundle]))

    assert bench.effects() == [("EUR", 1), ("EUR", 2)]


# One bad event ------------------------------------------------------------------------------------


def test_a_bad_event_does_not_stop_its_bundle_mates(bench: Bench) -> None:
    route = a_route(function=Failing({3: FOR_EVER}))

    bench.consumer.consume(Bundle(route, bench.write(1, 2, 3, 4, 5)))

    assert bench.effects() == [("EUR", 1), ("EUR", 2), ("EUR", 4), ("EUR", 5)]
    (delivery,) = bench.deliveries()
    assert (delivery.state, delivery.attempts, delivery.error_type) == ("retrying", 1, "RuntimeError")


def test_the_no_of_the_business_is_final(bench: Bench) -> None:
    act = Failing({1: FOR_EVER}, lambda: Refused("not today"))

    bench.consumer.consume(Bundle(a_route(function=act), bench.write(1)))

    (delivery,) = bench.deliveries()
    assert (delivery.state, delivery.attempts, delivery.error_type) == ("dead", 1, "Refused")
    assert bench.retry(a_route(function=act)) == 0
    assert act.calls == [1]


def test_a_transient_refusal_is_tried_again(bench: Bench) -> None:
    act = Failing({1: 2}, lambda: NotFound("not yet"))
    route = a_route(function=act, transient_errors=(NotFound,))
    bench.consumer.consume(Bundle(route, bench.write(1)))
    bench.retry(route)
    assert [(delivery.state, delivery.attempts) for delivery in bench.deliveries()] == [("retrying", 2)]

    bench.retry(route)

    assert bench.effects() == [("EUR", 1)]
    assert bench.deliveries() == []


def test_another_refusal_is_final_all_the_same(bench: Bench) -> None:
    route = a_route(function=Failing({1: FOR_EVER}, lambda: Refused("no")), transient_errors=(NotFound,))

    bench.consumer.consume(Bundle(route, bench.write(1)))

    assert bench.states() == [("EUR", "dead")]


@pytest.mark.parametrize("error", [SystemExit, asyncio.CancelledError, GeneratorExit])
def test_what_is_no_exception_is_a_failure_too(bench: Bench, error: type[Exception]) -> None:
    bench.consumer.consume(Bundle(a_route(function=Failing({2: FOR_EVER}, error)), bench.write(1, 2, 3)))

    assert bench.effects() == [("EUR", 1), ("EUR", 3)]
    assert [delivery.error_type for delivery in bench.deliveries()] == [error.__name__]


def test_an_event_is_retried_with_growing_pauses_and_then_dead_with_its_traceback(bench: Bench) -> None:
    route = a_route(function=Failing({1: FOR_EVER}), max_attempts=4, backoff_seconds=10.0, max_backoff_seconds=35.0)
    bench.consumer.consume(Bundle(route, bench.write(1)))
    pauses = []

    while (delivery := bench.deliveries()[0]).state == "retrying":
        pauses.append(delivery.pause_seconds)
        bench.retry(route)

    assert len(pauses) == 3
    for pause, longest in zip(pauses, (10, 20, 35), strict=True):
        assert pause is not None
        assert longest / 2 - 1 <= pause <= longest + 1
    assert (delivery.state, delivery.attempts, delivery.pause_seconds) == ("dead", 4, None)
    assert delivery.error is not None
    assert "Traceback" in delivery.error
    assert "__call__" in delivery.error
    assert bench.effects() == []


@given(st.integers(1, 100_000), st.floats(0.01, 1e4), st.floats(0.01, 1e6))
def test_a_pause_is_never_longer_than_the_route_allows(tries: int, first: float, longest: float) -> None:
    route = a_route(backoff_seconds=first, max_backoff_seconds=longest)

    pause = route.backoff(tries).total_seconds()

    usual = min(first * 2.0 ** min(tries - 1, 100), longest)
    assert usual / 2 - 1e-6 <= pause <= usual + 1e-6


def test_a_retry_that_succeeds_leaves_nothing_behind(bench: Bench) -> None:
    route = a_route(function=Failing({1: 2}))
    bench.consumer.consume(Bundle(route, bench.write(1)))

    bench.retry(route)
    assert bench.states() == [("EUR", "retrying")]
    bench.retry(route)

    assert bench.deliveries() == []
    assert bench.effects() == [("EUR", 1)]


def test_a_retry_that_arrives_twice_is_acted_on_once(bench: Bench) -> None:
    act = Failing({1: 1})
    route = a_route(function=act)
    bundle = bench.write(1)
    bench.consumer.consume(Bundle(route, bundle))

    bench.retry(route)
    bench.consumer.consume(Bundle(route, bundle, retry=True))

    assert bench.effects() == [("EUR", 1)]
    assert len(act.calls) == 2


def test_a_retry_that_arrives_after_the_event_was_buried_is_not_acted_on(bench: Bench) -> None:
    act = Failing({1: FOR_EVER}, lambda: Refused("no"))
    route = a_route(function=act)
    bundle = bench.write(1)
    bench.consumer.consume(Bundle(route, bundle))

    bench.consumer.consume(Bundle(route, bundle, retry=True))

    assert act.calls == [1]
    assert bench.states() == [("EUR", "dead")]


def test_the_bundle_of_a_dead_event_is_not_acted_on_again(bench: Bench) -> None:
    act = Failing({1: FOR_EVER}, lambda: Refused("no"))
    route = a_route(function=act)
    bundle = bench.write(1, 2)
    bench.consumer.consume(Bundle(route, bundle))
    calls = list(act.calls)

    bench.consumer.consume(Bundle(route, bundle))

    assert act.calls == calls
    assert bench.states() == [("EUR", "dead")]
    assert bench.effects() == [("EUR", 2)]


def test_a_provider_that_is_away_spends_no_attempt(bench: Bench) -> None:
    act = Failing({1: 5}, lambda: GatewayUnavailable("no line"))
    route = a_route(function=act, max_attempts=2)
    bench.consumer.consume(Bundle(route, bench.write(1)))

    for _ in range(4):
        (delivery,) = bench.deliveries()
        assert (delivery.state, delivery.attempts) == ("retrying", 0)
        bench.retry(route)
    bench.retry(route)

    assert bench.deliveries() == []
    assert bench.effects() == [("EUR", 1)]


def test_an_event_of_an_unknown_type_is_kept(bench: Bench) -> None:
    with bench.engine.begin() as connection:
        connection.execute(text("select dovecote.append_event('price', 'EUR', 'pricing.price_quoted.v99', '{}')"))

    bench.consumer.consume(Bundle(a_route(), bench.envelopes()))

    (delivery,) = bench.deliveries()
    assert (delivery.state, delivery.error_type) == ("retrying", "UnknownEvent")


def test_an_error_s_text_contains_no_phone_number_and_no_password(bench: Bench) -> None:
    def leak(event: Any, uow: UnitOfWork, _gateways: object) -> None:
        try:
            raise ValueError("cannot call +1 201 555 0123")
        except ValueError as error:
            raise RuntimeError("postgresql://dovecote:hunter2@db/x said +12015550123") from error

    bench.consumer.consume(Bundle(a_route(function=leak), bench.write(1)))

    recorded = bench.deliveries()[0].error
    assert recorded is not None
    assert "RuntimeError" in recorded
    for secret in ("hunter2", "2015550123", "201 555 0123"):
        assert secret not in recorded


def test_a_failure_s_log_line_contains_no_secret(bench: Bench) -> None:
    act = Failing({1: FOR_EVER}, lambda: ValueError("token=abcdef123456 for +12015550123"))

    with capture_logs() as logs:
        bench.consumer.consume(Bundle(a_route(function=act), bench.write(1)))

    assert [line["error"] for line in logs] == ["ValueError: token=*** for +***23"]


def test_a_delivery_names_the_trace_that_wrote_the_event(bench: Bench) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with unit_of_work(bench.sessions, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-00"}) as uow:
        uow.emit(a_quote("EUR", 1))

    bench.consumer.consume(Bundle(a_route(function=Failing({1: FOR_EVER})), bench.envelopes()))

    with bench.engine.connect() as connection:
        assert connection.scalar(text("select trace_id from dovecote.deliveries")) == trace


# In order -----------------------------------------------------------------------------------------


def test_later_events_of_an_aggregate_wait_for_the_one_that_failed(bench: Bench) -> None:
    route = a_route(function=Failing({1: 2}), ordered=True)  # with its bundle, and alone
    bundle = [*bench.write(1, 2, 3, symbol="A"), *bench.write(4, symbol="B")]

    bench.consumer.consume(Bundle(route, bundle))
    assert bench.states() == [("A", "retrying"), ("A", "waiting"), ("A", "waiting")]
    bench.consumer.consume(Bundle(route, bench.write(5, symbol="A")))
    assert bench.effects() == [("B", 4)]

    bench.retry(route)
    assert bench.states() == [("A", "retrying"), ("A", "waiting"), ("A", "waiting")]
    bench.retry(route)

    assert bench.effects() == [("B", 4), ("A", 1), ("A", 2), ("A", 3), ("A", 5)]
    assert bench.deliveries() == []


def test_of_one_bundle_the_second_waits_when_the_first_must_wait(bench: Bench) -> None:
    failing = Failing({1: FOR_EVER})
    route = a_route(function=failing, ordered=True)
    bench.consumer.consume(Bundle(route, bench.write(1, symbol="A")))

    bench.consumer.consume(Bundle(route, bench.write(2, 3, symbol="A")))

    assert failing.calls == [1]
    assert bench.states() == [("A", "retrying"), ("A", "waiting"), ("A", "waiting")]


def test_a_dead_event_blocks_its_aggregate_and_no_other(bench: Bench) -> None:
    route = a_route(function=Failing({1: FOR_EVER}, lambda: Refused("no")), ordered=True)

    bench.consumer.consume(Bundle(route, [*bench.write(1, 2, symbol="A"), *bench.write(3, symbol="B")]))
    bench.consumer.consume(Bundle(route, bench.write(4, symbol="A")))

    assert bench.states() == [("A", "dead"), ("A", "waiting"), ("A", "waiting")]
    assert bench.release_unblocked(route) == 0
    assert bench.effects() == [("B", 3)]


def test_discarding_an_event_that_waits_frees_nobody_behind_it(bench: Bench) -> None:
    route = a_route(function=Failing({1: FOR_EVER}, lambda: Refused("no")), ordered=True)
    bench.consumer.consume(Bundle(route, bench.write(1, 2, 3, symbol="A")))
    assert bench.states() == [("A", "dead"), ("A", "waiting"), ("A", "waiting")]

    bench.discard(2)

    assert bench.release_unblocked(route) == 0
    assert bench.effects() == []
    bench.discard(1)
    assert bench.release_unblocked(route) == 1
    bench.retry(route)
    assert bench.effects() == [("A", 3)]


def test_an_event_waits_for_the_one_before_it_in_another_worker_s_hands(bench: Bench) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slow_at_first(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        if int(event.price) == 1:
            began.set()
            assert go_on.wait(10)
        note_as("test.note", event, uow)

    route = a_route(function=slow_at_first, ordered=True)
    first, second = bench.write(1, 2, symbol="A")
    worker = threading.Thread(target=bench.consumer.consume, args=(Bundle(route, [first]),))
    worker.start()
    assert began.wait(10)

    bench.consumer.consume(Bundle(route, [second]))
    assert bench.states() == [("A", "waiting")]
    assert bench.effects() == []
    go_on.set()
    worker.join()

    assert bench.states() == [("A", "retrying")], "nobody sends on what waited"
    bench.retry(route)
    assert bench.effects() == [("A", 1), ("A", 2)]


def test_an_event_is_acted_on_at_once_when_the_one_before_it_soon_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    is_finished = Deliveries.is_finished

    def looks(deliveries: Deliveries, event_id: UUID) -> bool:
        looked.set()
        return is_finished(deliveries, event_id)

    def slow_at_first(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        if int(event.price) == 1:
            assert looked.wait(10)
        note_as("test.note", event, uow)

    monkeypatch.setattr(Deliveries, "is_finished", looks)
    route = a_route(function=slow_at_first, ordered=True)
    first, second = bench.write(1, 2, symbol="A")
    later = threading.Thread(target=bench.consumer.consume, args=(Bundle(route, [second]),))
    later.start()
    assert looked.wait(10)

    bench.consumer.consume(Bundle(route, [first]))
    later.join()

    assert bench.effects() == [("A", 1), ("A", 2)]
    assert bench.deliveries() == []


def test_an_event_parked_while_its_predecessor_commits_is_found_and_sent_on(bench: Bench) -> None:
    committing, go_on = threading.Event(), threading.Event()

    def commit_slowly(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        note_as("test.note", event, uow)
        if int(event.price) == 1:

            def wait(_session: Session) -> None:
                committing.set()
                assert go_on.wait(10)

            listen(uow.session, "before_commit", wait)

    route = a_route(function=commit_slowly, ordered=True)
    first, second = bench.write(1, 2, symbol="A")
    worker = threading.Thread(target=bench.consumer.consume, args=(Bundle(route, [first]),))
    worker.start()
    assert committing.wait(10)

    bench.consumer.consume(Bundle(route, [second]))
    go_on.set()
    worker.join()
    assert bench.states() == [("A", "waiting")], "the one before it took too long to commit"
    assert bench.release_unblocked(route) == 1
    bench.retry(route)

    assert bench.effects() == [("A", 1), ("A", 2)]
    assert bench.deliveries() == []


def test_a_handler_added_later_is_not_blocked_by_events_from_before_it(bench: Bench) -> None:
    route = a_route(ordered=True)
    (before,) = bench.write(1, symbol="A")
    with bench.engine.begin() as connection:
        connection.execute(
            text("insert into dovecote.subscriptions values (:handler, :event_type, :position)"),
            {"handler": route.handler, "event_type": before.type, "position": before.position},
        )

    bench.consumer.consume(Bundle(route, bench.write(2, symbol="A")))

    assert bench.effects() == [("A", 2)]
    assert bench.deliveries() == []


def test_many_workers_keep_the_order_of_every_aggregate(bench: Bench) -> None:
    flaky = Failing(dict.fromkeys(range(0, 60, 7), 3))
    route = a_route(function=flaky, ordered=True, backoff_seconds=0.001)
    written = [envelope for price in range(60) for envelope in bench.write(price, symbol=f"S{price % 4}")]
    bundles = [written[start : start + 3] for start in range(0, 60, 3)]

    workers = [
        threading.Thread(target=bench.consumer.consume, args=(Bundle(route, bundle),)) for bundle in bundles[::-1]
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    def nothing_left() -> bool:
        bench.release_unblocked(route)
        return bench.retry(route) == 0 and bench.deliveries() == []

    eventually(nothing_left, 20, "every delivery resolved")
    assert len(bench.effects()) == 60
    for symbol in ("S0", "S1", "S2", "S3"):
        prices = [price for of, price in bench.effects() if of == symbol]
        assert prices == sorted(prices)


# Too long -----------------------------------------------------------------------------------------


def for_ever(_uow: UnitOfWork) -> None:
    while True:
        time.sleep(0.01)  # a handler that hangs


def in_postgres(uow: UnitOfWork) -> None:
    uow.session.execute(text("select pg_sleep(25)"))


def and_says_it_is_another_error(uow: UnitOfWork) -> None:
    try:
        for_ever(uow)
    except BaseException as error:
        raise KeyError("something else") from error


def and_swallows_it(uow: UnitOfWork) -> None:
    with suppress(BaseException):
        for_ever(uow)


@pytest.mark.once
@pytest.mark.parametrize("hang", [for_ever, in_postgres, and_says_it_is_another_error, and_swallows_it])
@pytest.mark.parametrize("bulk", [False, True])
def test_a_handler_that_hangs_is_cut_off_and_its_bundle_mates_go_through(
    bench: Bench, hang: Callable[[UnitOfWork], None], bulk: bool
) -> None:
    def act_on(event: Any, uow: UnitOfWork) -> None:
        note_as("test.note", event, uow)
        if int(event.price) == 2:
            hang(uow)

    def one(event: Any, uow: UnitOfWork, _gateways: object) -> None:
        act_on(event, uow)

    def all_of_them(envelopes: Sequence[Envelope], uow: UnitOfWork, _gateways: object) -> None:
        for envelope in envelopes:
            act_on(envelope.event, uow)

    route = a_route(function=all_of_them if bulk else one, bulk=bulk, time_limit_seconds=0.3)
    began = time.monotonic()

    bench.consumer.consume(Bundle(route, bench.write(1, 2, 3)))

    assert time.monotonic() - began < 15, "it was not cut off"
    assert bench.effects() == [("EUR", 1), ("EUR", 3)]
    (delivery,) = bench.deliveries()
    assert (delivery.state, delivery.attempts, delivery.error_type) == ("retrying", 1, "TimeLimitExceeded")
    assert delivery.error is not None
    assert "cut off after 0.3 s" in delivery.error
    if hang is not and_swallows_it:
        assert hang.__name__ in delivery.error, "it says where it was"


@pytest.mark.once
def test_a_handler_that_hangs_in_a_replay_is_cut_off_and_tried_again_for_it(bench: Bench) -> None:
    calls: list[int] = []

    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        calls.append(int(event.price))
        note_as("test.note", event, uow)
        if calls.count(2) in (2, 3) and event.price == 2:
            uow.session.execute(text("select pg_sleep(60)"))

    route = a_route(function=act, time_limit_seconds=0.3)
    written = bench.write(1, 2)
    bench.consumer.consume(Bundle(route, written))
    replay = bench.replay_again()

    bench.consumer.consume(Bundle(route, written, replay=replay))

    (delivery,) = bench.deliveries()
    assert (delivery.state, delivery.error_type) == ("retrying", "TimeLimitExceeded")
    bench.consumer.consume(Bundle(route, written[1:], retry=True, replay=replay))
    bench.consumer.consume(Bundle(route, written, replay=replay))
    assert bench.effects() == [("EUR", 1), ("EUR", 2), ("EUR", 1), ("EUR", 2)]
    assert bench.deliveries() == []


@pytest.mark.once
def test_the_limit_is_for_each_event_of_a_bundle(bench: Bench) -> None:
    calls = []

    def slow(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        calls.append(event)
        time.sleep(0.2)  # a slow handler
        note_as("test.note", event, uow)

    bench.consumer.consume(Bundle(a_route(function=slow, time_limit_seconds=1.0), bench.write(*range(8))))

    assert len(calls) == 8, "the bundle was cut off"
    assert bench.deliveries() == []


@pytest.mark.once
def test_many_handlers_that_end_just_in_time_are_each_done_or_cut_off(bench: Bench) -> None:
    def nearly(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        note_as("test.note", event, uow)
        time.sleep(0.05 + int(event.price) / 100)  # around the time limit

    route = a_route(function=nearly, time_limit_seconds=0.05)
    bundles = [bench.write(price, symbol=f"S{price}") for price in range(24)]
    workers = [threading.Thread(target=bench.consumer.consume, args=(Bundle(route, bundle),)) for bundle in bundles]

    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    done, cut_off = dict(bench.effects()), dict(bench.states())
    assert done.keys() | cut_off.keys() == {f"S{price}" for price in range(24)}
    assert not done.keys() & cut_off.keys()
    assert set(cut_off.values()) <= {"retrying"}


# Postgres goes away -------------------------------------------------------------------------------


def terminate_consumers(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where application_name = %s", (APPLICATION,)
        )


@pytest.mark.parametrize("when", ["before the effect", "after the effect", "at the commit"])
def test_losing_postgres_spends_no_attempt_and_doubles_nothing(bench: Bench, when: str) -> None:
    calls = []

    def interrupted(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        calls.append(event)
        first = len(calls) == 1
        if first and when == "before the effect":
            terminate_consumers(bench.url)
        note_as("test.note", event, uow)
        if first and when == "after the effect":
            terminate_consumers(bench.url)
        if first and when == "at the commit":
            listen(uow.session, "before_commit", lambda _session: terminate_consumers(bench.url))

    # Alone, so that a failure of the bundle would be its own.
    bench.consumer.consume(Bundle(a_route(function=interrupted), bench.write(1)))

    assert len(calls) == 2, "it was not interrupted"
    assert bench.effects() == [("EUR", 1)]
    assert bench.deliveries() == []


@pytest.fixture
def consumer_engine_of(settings: Settings) -> Iterator[Callable[..., Engine]]:
    """Engines as worker processes have them."""
    engines = []

    def build(route: Route, statement_timeout_ms: int = 30_000) -> Engine:
        database = settings.database.model_copy(update={"statement_timeout_ms": statement_timeout_ms})
        engines.append(consumer_engine(settings.model_copy(update={"database": database}), [route]))
        return engines[-1]

    yield build
    for engine in engines:
        engine.dispose()


def test_postgres_notices_that_a_worker_is_gone_or_frozen(consumer_engine_of: Callable[..., Engine]) -> None:
    with consumer_engine_of(a_route(time_limit_seconds=7)).connect() as connection:
        names = ("tcp_keepalives_idle", "tcp_user_timeout", "idle_in_transaction_session_timeout", "lock_timeout")
        found = [connection.scalar(text(f"show {name}")) for name in names]

    assert found == ["5", "14000", "27s", "15s"]


@pytest.mark.once
def test_what_a_frozen_worker_has_locked_is_waited_for_and_spends_no_attempt(
    bench: Bench, consumer_engine_of: Callable[..., Engine]
) -> None:
    route = a_route()
    bundle = bench.write(1, 2)
    consumer = Consumer(sessions_for(consumer_engine_of(route, 400)), bench.gateways, outage_max_backoff_seconds=0.05)
    with closing(psycopg.connect(bench.url, options="-c idle_in_transaction_session_timeout=900")) as frozen:
        frozen.execute(
            "insert into dovecote.processed_events (event_id, handler_name) values (%s, 'test.note')",
            (bundle[0].event_id,),
        )

        consumer.consume(Bundle(route, bundle))

    assert bench.effects() == [("EUR", 1), ("EUR", 2)]
    assert bench.deliveries() == []


@pytest.mark.once
def test_a_long_bundle_that_has_nothing_to_say_to_postgres_is_not_taken_for_frozen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def slow(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        calls.append(event)
        time.sleep(0.2)  # a slow provider

    monkeypatch.setattr("dovecote.consumer.transaction.MAX_SILENCE_SECONDS", 0.1)
    engine = connect(bench.url, session_settings={"idle_in_transaction_session_timeout": 700})

    Consumer(sessions_for(engine), bench.gateways, bench.stopping, 0.05).consume(
        Bundle(a_route(function=slow), bench.write(*range(8)))
    )

    engine.dispose()
    assert len(calls) == 8, "its session was ended"


def test_losing_postgres_while_a_failure_is_recorded_counts_it_once(bench: Bench) -> None:
    def fail_and_cut(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        listen(uow.session, "after_rollback", lambda _session: terminate_consumers(bench.url))
        raise RuntimeError

    bench.consumer.consume(Bundle(a_route(function=fail_and_cut), bench.write(1)))

    assert [(delivery.state, delivery.attempts) for delivery in bench.deliveries()] == [("retrying", 1)]


def test_a_failure_whose_record_was_committed_without_a_reply_counts_once(bench: Bench) -> None:
    port = make_url(bench.url).port
    assert port is not None
    with PostgresProxy(port) as proxy:
        engine = connect(f"{proxy.through(bench.url)}?sslmode=disable&gssencmode=disable")

        def fail(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
            proxy.lose_commit_replies(1)
            raise RuntimeError

        Consumer(sessions_for(engine), bench.gateways, outage_max_backoff_seconds=0.05).consume(
            Bundle(a_route(function=fail), bench.write(1))
        )

        engine.dispose()
        assert proxy.lost == 1
    assert [(delivery.state, delivery.attempts) for delivery in bench.deliveries()] == [("retrying", 1)]


@pytest.mark.parametrize("where", ["a database of its own", "a cache of its own", "a link of Postgres"])
def test_a_server_that_is_away_for_the_handler_alone_holds_up_no_other_event(bench: Bench, where: str) -> None:
    def ask(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        if int(event.price) != 2:
            note_as("test.note", event, uow)
        elif where == "a database of its own":
            psycopg.connect("postgresql://nobody@127.0.0.1:1/nothing")
        elif where == "a cache of its own":
            redis.Redis(port=1, retry=Retry(NoBackoff(), 0)).ping()  # the default pauses for seconds at each call
        else:
            uow.session.execute(text("do $$ begin raise exception 'no link' using errcode = '08001'; end $$"))

    bench.consumer.consume(Bundle(a_route(function=ask, max_attempts=1), bench.write(1, 2, 3)))

    assert bench.effects() == [("EUR", 1), ("EUR", 3)]
    assert [(delivery.state, delivery.attempts) for delivery in bench.deliveries()] == [("retrying", 0)]


@pytest.mark.once
def test_more_threads_than_connections_wait_for_one_another_and_spend_no_attempt(bench: Bench) -> None:
    engine = connect(bench.url, pool_size=1)
    engine.pool._timeout = 0.05  # type: ignore[attr-defined]  # SQLAlchemy's is half a minute
    consumer = Consumer(sessions_for(engine), bench.gateways, outage_max_backoff_seconds=0.05)

    def slow(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        note_as("test.note", event, uow)
        time.sleep(0.2)  # a slow provider

    bundles = [bench.write(price) for price in range(6)]
    workers = [
        threading.Thread(target=consumer.consume, args=(Bundle(a_route(function=slow), bundle),)) for bundle in bundles
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    engine.dispose()
    assert sorted(bench.effects()) == [("EUR", price) for price in range(6)]
    assert bench.deliveries() == []


@pytest.mark.parametrize("sqlstate", ["40001", "40P01", "53300"])
def test_errors_that_ask_to_try_again_spend_no_attempt(bench: Bench, sqlstate: str) -> None:
    calls = []

    def unlucky(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        calls.append(event)
        if len(calls) < 3:
            uow.session.execute(text(f"do $$ begin raise exception 'unlucky' using errcode = '{sqlstate}'; end $$"))
        note_as("test.note", event, uow)

    bench.consumer.consume(Bundle(a_route(function=unlucky), bench.write(1)))

    assert bench.effects() == [("EUR", 1)]
    assert bench.deliveries() == []


def test_a_conflict_that_never_ends_is_a_failure_in_the_end(bench: Bench) -> None:
    def always_in_the_way(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        if int(event.price) == 1:
            uow.session.execute(text("do $$ begin raise exception 'again' using errcode = '40001'; end $$"))
        note_as("test.note", event, uow)

    bench.consumer.consume(Bundle(a_route(function=always_in_the_way), bench.write(1, 2)))

    assert bench.effects() == [("EUR", 2)]
    assert [(delivery.state, delivery.attempts) for delivery in bench.deliveries()] == [("retrying", 1)]


@pytest.mark.once
def test_a_request_to_stop_ends_the_wait_for_postgres(bench: Bench) -> None:
    nowhere = connect("postgresql://nobody@127.0.0.1:1/nothing")
    consumer = Consumer(sessions_for(nowhere), bench.gateways, bench.stopping, outage_max_backoff_seconds=60)
    bundle = bench.write(1)
    threading.Timer(0.2, bench.stopping.set).start()

    with pytest.raises(Stopping):
        consumer.consume(Bundle(a_route(), bundle))
