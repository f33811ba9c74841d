"""A message that was in flight in a dying process: one event at a time, one such message at a time, each counted.

Here processes die only on record (a crash count that was left behind); in tests/flows/test_poison.py they do die.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
import redis
from sqlalchemy.orm import Session, sessionmaker

from domain.pricing import PriceQuoted
from dovecote.consumer.retrying import Stopping
from dovecote.envelope.signatures import MessageKeys, split_crash_counts
from dovecote.store.bundle import Bundle
from dovecote.store.poison import PoisonMessage
from dovecote.unit_of_work import UnitOfWork
from tests.conftest import Servers
from tests.dovecote.consumer.test_consumer import FOR_EVER, Bench, Failing, bench
from tests.support.effects import a_route, note_as
from tests.support.processes import eventually

__all__ = ["bench"]
pytestmark = pytest.mark.servers


class Queue:
    """Where the crash counts of one queue are."""

    def __init__(self, client: Any, keys: MessageKeys) -> None:
        self.client, self.keys, self.name = client, keys, f"test-{uuid4().hex[:8]}:test"

    def poison(self, crashes: int, message_id: str = "m") -> PoisonMessage:
        return PoisonMessage(self.client, self.keys, self.name, message_id, crashes)

    def left_behind(self, by_event: dict[UUID, int], explained: int = 0) -> None:
        """Processes died while these were in flight."""
        counts = {"by_event": {str(id): times for id, times in by_event.items()}, "explained": explained}
        signed = self.keys.newest().sign_crash_counts("m", orjson.dumps(counts))
        self.client.hset(f"{self.name}.in_flight", "m", signed)

    def counted(self) -> dict[str, int]:
        found = self.client.hget(f"{self.name}.in_flight", "m")
        parts = split_crash_counts(found) if found else None
        return dict(orjson.loads(parts[0])["by_event"]) if parts else {}

    def is_clean(self) -> bool:
        return not self.client.exists(f"{self.name}.in_flight")


@pytest.fixture
def queue(servers: Servers, sessions: sessionmaker[Session]) -> Iterator[Queue]:
    with redis.Redis.from_url(servers.redis_url) as client:
        queue = Queue(client, MessageKeys(sessions))
        yield queue
        client.delete(f"{queue.name}.in_flight")


def test_only_the_event_in_flight_is_counted(bench: Bench, queue: Queue) -> None:
    seen = []

    def look(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        seen.append((str(event.event_id), queue.counted()))
        note_as("test.note", event, uow)
        if int(event.price) == 2:
            raise RuntimeError

    written = bench.write(1, 2, 3)
    bench.consumer.consume(Bundle(a_route(function=look), written, poison=queue.poison(1)))

    assert seen == [(str(envelope.event_id), {str(envelope.event_id): 1}) for envelope in written]
    assert bench.effects() == [("EUR", 1), ("EUR", 3)]
    assert bench.states() == [("EUR", "retrying")]
    assert queue.is_clean()


def test_an_event_in_flight_in_three_dying_processes_is_not_handled_again(bench: Bench, queue: Queue) -> None:
    handler = Failing({})
    written = bench.write(1, 2, 3)
    queue.left_behind({written[1].event_id: 3})

    bench.consumer.consume(Bundle(a_route(function=handler), written, poison=queue.poison(3)))

    assert handler.calls == [1, 3]
    (delivery,) = bench.deliveries()
    assert (delivery.state, delivery.error_type, delivery.attempts) == ("dead", "KilledTheProcess", 1)
    assert queue.is_clean()


def test_the_crash_in_which_nothing_was_counted_counts_against_the_first_that_dies_again(
    bench: Bench, queue: Queue
) -> None:
    handler = Failing({})
    written = bench.write(1, 2)
    queue.left_behind({written[0].event_id: 2})

    bench.consumer.consume(Bundle(a_route(function=handler), written, poison=queue.poison(3)))

    assert handler.calls == [2]


def test_crashes_that_a_dead_letter_explains_count_against_no_other(bench: Bench, queue: Queue) -> None:
    handler = Failing({})
    written = bench.write(1, 2)
    queue.left_behind({written[1].event_id: 2}, explained=3)

    bench.consumer.consume(Bundle(a_route(function=handler), written, poison=queue.poison(5)))

    assert handler.calls == [1, 2]
    assert bench.deliveries() == []


def test_what_is_done_or_on_record_already_is_not_dead_lettered(bench: Bench, queue: Queue) -> None:
    route = a_route(function=Failing({2: FOR_EVER}))
    written = bench.write(1, 2)
    bench.consumer.consume(Bundle(route, written))
    before = bench.deliveries()
    queue.left_behind({envelope.event_id: 3 for envelope in written})

    bench.consumer.consume(Bundle(route, written, poison=queue.poison(3)))

    assert bench.deliveries() == before
    assert queue.is_clean()


def test_in_a_replay_what_it_has_not_acted_on_again_is_dead_lettered(bench: Bench, queue: Queue) -> None:
    handler = Failing({})
    route = a_route(function=handler)
    written = bench.write(1, 2, 3)
    bench.consumer.consume(Bundle(route, written))
    replay = bench.replay_again()
    queue.left_behind({written[1].event_id: 3})

    bench.consumer.consume(Bundle(route, written, replay=replay, poison=queue.poison(3)))

    assert handler.calls == [1, 2, 3, 1, 3]
    (delivery,) = before = bench.deliveries()
    assert (delivery.state, delivery.error_type) == ("dead", "KilledTheProcess")

    queue.left_behind({envelope.event_id: 3 for envelope in written})
    bench.consumer.consume(Bundle(route, written, replay=replay, poison=queue.poison(3)))

    assert (handler.calls, bench.deliveries()) == ([1, 2, 3, 1, 3], before)
    assert queue.is_clean()


def test_a_full_redis_that_takes_no_crash_counts_is_waited_for_without_an_attempt(bench: Bench, queue: Queue) -> None:
    def refused() -> int:
        return int(queue.client.info("errorstats").get("errorstat_OOM", {"count": 0})["count"])

    before = refused()
    bundle = bench.write(1, 2)
    with ThreadPoolExecutor() as pool:
        queue.client.config_set("maxmemory", 1)
        try:
            running = pool.submit(bench.consumer.consume, Bundle(a_route(), bundle, poison=queue.poison(1)))
            eventually(lambda: refused() > before + 3, 10, "some tries to write a crash count")
        finally:
            queue.client.config_set("maxmemory", 0)
        running.result(30)

    assert bench.effects() == [("EUR", 1), ("EUR", 2)]
    assert bench.deliveries() == []
    assert queue.is_clean()


def test_one_poison_message_is_handled_at_a_time_and_delays_no_other_message(bench: Bench, queue: Queue) -> None:
    lock = threading.Lock()
    in_flight: list[PriceQuoted] = []
    most = 0
    over = threading.Event()

    def slow(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        nonlocal most
        with lock:
            in_flight.append(event)
            most = max(most, len(in_flight))
        over.wait(0.03)
        in_flight.remove(event)
        note_as("test.slow", event, uow)

    def hold_up(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        assert over.wait(30)
        note_as("test.held", event, uow)

    messages = [(bench.write(n, n + 10), queue.poison(1, f"m{n}")) for n in range(4)]
    held = bench.write(100)
    with ThreadPoolExecutor() as pool:
        route = a_route("test.slow", slow)
        running = [pool.submit(bench.consumer.consume, Bundle(route, b, poison=one)) for b, one in messages]
        for one in running:
            one.result(30)
        assert most == 1
        last = pool.submit(bench.consumer.consume, Bundle(a_route("test.held", hold_up), held, poison=queue.poison(1)))
        bench.consumer.consume(Bundle(a_route(), bench.write(50)))
        assert ("EUR", 50) in bench.effects()
        over.set()
        last.result(30)


def test_a_poison_message_that_waits_for_another_gives_up_when_the_process_stops(bench: Bench, queue: Queue) -> None:
    started, over = threading.Event(), threading.Event()

    def hold_up(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        started.set()
        assert over.wait(30)

    first, second = bench.write(1), bench.write(2)
    with ThreadPoolExecutor() as pool:
        holding = pool.submit(bench.consumer.consume, Bundle(a_route(function=hold_up), first, poison=queue.poison(1)))
        assert started.wait(30)
        waiting = pool.submit(bench.consumer.consume, Bundle(a_route(), second, poison=queue.poison(1, "m2")))
        bench.stopping.set()
        with pytest.raises(Stopping):
            waiting.result(30)
        over.set()
        holding.result(30)
