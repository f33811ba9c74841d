"""What our broker adds to Dramatiq's: waiting without polling, publishing once, and giving back in order."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import dramatiq
import orjson
import pytest
from dramatiq.broker import MessageProxy
from dramatiq.common import current_millis

from dovecote.bootstrap import _StopsWaiting, broker_for, declare_handlers
from dovecote.broker.broker import OutboxBroker
from dovecote.broker.fetcher import Fetcher
from dovecote.broker.publisher import Publisher, QueuedBundle
from dovecote.broker.redis_client import connect_redis
from dovecote.consumer.consumer import Consumer
from dovecote.consumer.middleware import RequeueWhatFails
from dovecote.envelope.signatures import MessageKey
from dovecote.errors import NewerRelay, RedisLost
from dovecote.relay import fence as fencing
from dovecote.relay.bundler import bundle
from dovecote.relay.fence import Claim, RedisFence
from dovecote.store.connections import connect, sessions_for
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route
from tests.support.processes import eventually
from tests.support.system import claim, publisher_of
from workers.gateways import gateways_for

pytestmark = pytest.mark.servers

QUEUE = "test"
OURS = [f"{kind}{number:032x}" for number, kind in enumerate("brbbrbbb")]

Brokers = Callable[..., OutboxBroker]


@pytest.fixture
def broker_with(servers: Servers) -> Iterator[Brokers]:
    """Builds brokers, as many as there are processes, that share one namespace."""
    namespace = f"test-{uuid4().hex[:8]}"
    built: list[OutboxBroker] = []

    def build(**options: Any) -> OutboxBroker:
        broker = OutboxBroker(url=servers.redis_url, namespace=namespace, **{"middleware": [], **options})
        broker.declare_queue(QUEUE)
        built.append(broker)
        return broker

    yield build
    for broker in built:
        clean(broker)


def clean(broker: OutboxBroker) -> None:
    for key in broker.client.scan_iter(f"{broker.namespace}:*"):
        broker.client.delete(key)
    broker.client.close()


def a_bundle(id: str, actor: str = "nobody", args: Sequence[object] = ()) -> QueuedBundle:
    message = {
        "queue_name": QUEUE,
        "actor_name": actor,
        "args": list(args),
        "kwargs": {},
        "options": {"redis_message_id": id},
        "message_id": id,
        "message_timestamp": 0,
    }
    return QueuedBundle(actor, QUEUE, id, orjson.dumps(message))


def publish(broker: OutboxBroker, *bundles: QueuedBundle) -> int:
    claim(publisher_of(broker), 1)
    return publisher_of(broker).publish(1, bundles)


def queued(broker: OutboxBroker | Publisher) -> list[str]:
    client: Any = broker.client
    return [id.decode() for id in client.lrange(f"{broker.namespace}:{QUEUE}", 0, -1)]


def a_consumer(broker: OutboxBroker, prefetch: int = 10, timeout: int = 10) -> Fetcher:
    consumer = broker.consume(QUEUE, prefetch=prefetch, timeout=timeout)
    assert isinstance(consumer, Fetcher)
    return consumer


def take(consumer: Fetcher, count: int) -> list[MessageProxy]:
    taken = [message for message in (next(consumer) for _ in range(count)) if message is not None]
    assert len(taken) == count
    return taken


def ids(messages: Sequence[MessageProxy]) -> list[str]:
    return [message.message_id for message in messages]


@contextmanager
def working(broker: OutboxBroker, threads: int = 1, timeout: int = 100) -> Iterator[dramatiq.Worker]:
    worker = dramatiq.Worker(broker, queues={QUEUE}, worker_threads=threads, worker_timeout=timeout)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(timeout=10_000)


# Waiting ------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_an_idle_worker_takes_a_message_at_once(broker_with: Brokers) -> None:
    broker = broker_with(poll_interval_ms=1_000)
    taken: list[float] = []

    def note() -> None:
        taken.append(time.monotonic())

    dramatiq.actor(actor_name="note", queue_name=QUEUE, broker=broker)(note)
    delays = []

    def taken_more_than(count: int) -> bool:
        return len(taken) > count

    with working(broker, timeout=1_000):
        for number in range(7):
            time.sleep(0.15)  # long enough for Dramatiq's own back-off to have grown
            sent = time.monotonic()
            publish(broker, a_bundle(f"m{number}", "note"))
            eventually(partial(taken_more_than, number), 5, "the message to be taken")
            delays.append(taken[-1] - sent)

    assert sorted(delays)[len(delays) // 2] < 0.05, delays


def test_waiting_takes_no_more_than_there_is_room_for_and_keeps_the_order(broker_with: Brokers) -> None:
    broker = broker_with()
    publish(broker, *(a_bundle(id) for id in "abcd"))

    assert ids(take(a_consumer(broker, prefetch=2), 2)) == ["a", "b"]

    assert queued(broker) == ["c", "d"]


def test_a_redis_that_has_forgotten_the_scripts_gets_them_again(broker_with: Brokers) -> None:
    broker = broker_with()
    consumer = a_consumer(broker)
    assert next(consumer) is None
    publish(broker, a_bundle("a"))

    broker.client.script_flush()

    assert ids(take(consumer, 1)) == ["a"]


@pytest.mark.alone
def test_a_full_redis_gives_what_it_has_and_is_not_asked_without_a_pause(broker_with: Brokers) -> None:
    broker = broker_with(poll_interval_ms=500)
    publish(broker, a_bundle("a"))
    consumer = a_consumer(broker, timeout=1_000)
    broker.client.config_set("maxmemory", 1)
    try:
        began = time.monotonic()
        (message,) = take(consumer, 1)
        consumer.ack(message)
        assert time.monotonic() - began < 0.4, "it paused"

        assert next(consumer) is None
        assert next(consumer) is None

        assert time.monotonic() - began > 1.0
    finally:
        broker.client.config_set("maxmemory", 0)


def test_an_idle_worker_asks_redis_rarely(broker_with: Brokers) -> None:
    broker = broker_with(poll_interval_ms=300)
    client: Any = broker.client
    consumer = a_consumer(broker, timeout=1_000)
    assert next(consumer) is None
    before = client.info("stats")["total_commands_processed"]

    began = time.monotonic()
    for _ in range(3):
        assert next(consumer) is None

    assert time.monotonic() - began > 0.8
    assert client.info("stats")["total_commands_processed"] - before < 30


# Publishing ---------------------------------------------------------------------------------------


def test_a_message_is_queued_once_until_it_is_done(broker_with: Brokers) -> None:
    broker = broker_with()
    consumer = a_consumer(broker)

    assert publish(broker, a_bundle("a"), a_bundle("b"), a_bundle("a")) == 2
    assert publish(broker, a_bundle("a")) == 0
    (first,) = take(consumer, 1)
    assert publish(broker, a_bundle("a")) == 0, "it is in somebody's hands"
    assert queued(broker) == []

    consumer.ack(first)

    assert publish(broker, a_bundle("a")) == 1


def test_only_the_newest_epoch_publishes(broker_with: Brokers) -> None:
    broker = broker_with()

    with pytest.raises(RedisLost):
        publisher_of(broker).publish(1, [a_bundle("a")])
    claim(publisher_of(broker), 3)
    claim(publisher_of(broker), 10)
    with pytest.raises(NewerRelay):
        claim(publisher_of(broker), 9)
    with pytest.raises(NewerRelay):
        publisher_of(broker).publish(9, [a_bundle("a")])

    assert queued(broker) == []
    assert publisher_of(broker).publish(10, [a_bundle("a")]) == 1


def test_an_epoch_that_somebody_has_made_up_is_a_lost_marker_and_no_newer_relay(broker_with: Brokers) -> None:
    broker = broker_with()
    publisher = publisher_of(broker)
    claim(publisher, 3)
    broker.client.set(f"{broker.namespace}:__relay__", 3 + 1_000_001)

    with pytest.raises(RedisLost):
        publisher.publish(3, [a_bundle("a")])


def test_redis_is_claimed_only_where_it_remembers_what_was_written_to_it(broker_with: Brokers) -> None:
    broker = broker_with()
    fence = RedisFence(publisher_of(broker))

    assert not claim(publisher_of(broker), 2, known_epoch=1)
    assert fence.read().epoch == 0, "an empty Redis was claimed"
    assert claim(publisher_of(broker), 1, history="a")
    assert not claim(publisher_of(broker), 2, over="b", history="b"), "another relay has claimed it meanwhile"
    assert not claim(publisher_of(broker), 2, over="a", history="a", known_epoch=3), "it is of another leadership"
    assert not claim(publisher_of(broker), 2, over="a", history="a", known_epoch=1, lowest_heartbeat=6), (
        "it has lost a heartbeat"
    )
    assert not fence.claim(Claim(2, "a", "1 1 1", heartbeat=4), over="a", known_epoch=1), "Postgres lost a heartbeat"
    assert not fence.claim(Claim(2, "a", "1 1 2", heartbeat=5), over="a", known_epoch=1), "another run of Postgres"
    assert fence.read().epoch == 1
    assert claim(publisher_of(broker), 2, over="a", history="a", known_epoch=1, lowest_heartbeat=5)
    assert fence.read().epoch == 2


def test_a_relay_of_another_history_publishes_nothing_though_its_epoch_is_the_same(broker_with: Brokers) -> None:
    ours, theirs = publisher_of(broker_with()), publisher_of(broker_with())
    assert claim(ours, 3, history="ours")
    assert claim(theirs, 3, over="ours", history="theirs")

    with pytest.raises(RedisLost):
        ours.publish(3, [a_bundle("a")])
    assert theirs.publish(3, [a_bundle(OURS[0])]) == 1
    with pytest.raises(RedisLost):
        list(RedisFence(ours).drop(Claim(3, "ours", "1 1 1", 5)))

    assert queued(theirs) == [OURS[0]]


def test_what_is_dropped_is_ours_on_every_queue_there_is(broker_with: Brokers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fencing, "_MAX_DROPPED", 2)
    broker = broker_with()
    client: Any = broker.client
    space = broker.namespace
    others = ["b" + 31 * "0", "b" + 32 * "A", "x" + 32 * "0", "c1"]
    lists = {f"{QUEUE}": QUEUE, "of.no.route": "of.no.route", f"{QUEUE}.DQ": f"{QUEUE}.DQ"}
    lists |= {f"{QUEUE}.held.h:1": QUEUE, f"{QUEUE}.XQ": f"{QUEUE}.XQ", "x:of.another.system": "x:of.another.system"}
    claim(publisher_of(broker), 1)
    for number, (name, queue) in enumerate(lists.items()):
        ids = [OURS[0][:-2] + f"{number}{n}" for n in range(5)]
        for id in [ids[0], others[0], others[1], *ids[1:4], others[2], ids[4], others[3]]:
            client.rpush(f"{space}:{name}", id)
            client.hset(f"{space}:{queue}.msgs", id, "message")
            client.hset(f"{space}:{queue}.in_flight", id, "mark")
    client.hset(f"{space}:{QUEUE}.msgs", OURS[7], "in a worker's hands")

    dropped = sum(RedisFence(publisher_of(broker)).drop(Claim(1, "", "1 1 1", 5)))

    kept = {f"{QUEUE}.XQ", "x:of.another.system"}
    assert dropped == 5 * (len(lists) - len(kept))
    for name, queue in lists.items():
        left = [id.decode() for id in client.lrange(f"{space}:{name}", 0, -1)]
        assert len(left) == 9 if name in kept else left == others
        marks = {id.decode() for id in client.hkeys(f"{space}:{queue}.in_flight")}
        known = {id.decode() for id in client.hkeys(f"{space}:{queue}.msgs")}
        assert set(left) <= marks
        assert known - {OURS[7]} == marks
    assert client.hget(f"{space}:{QUEUE}.msgs", OURS[7]) == b"in a worker's hands"


def test_a_redis_that_went_back_to_an_older_epoch_takes_nothing(broker_with: Brokers) -> None:
    broker = broker_with()
    claim(publisher_of(broker), 1)

    with pytest.raises(RedisLost):
        publisher_of(broker).publish(2, [a_bundle("a")])


# Giving back --------------------------------------------------------------------------------------


def test_messages_given_back_return_to_the_head_in_order(broker_with: Brokers) -> None:
    broker = broker_with()
    publish(broker, *(a_bundle(id) for id in "abcdef"))
    consumer = a_consumer(broker, prefetch=3)

    consumer.requeue(take(consumer, 3))

    assert queued(broker) == list("abcdef")


def test_a_closed_consumer_gives_back_what_it_has_not_handed_out(broker_with: Brokers) -> None:
    broker = broker_with()
    publish(broker, *(a_bundle(id) for id in "abcd"))
    consumer = a_consumer(broker, prefetch=3)
    take(consumer, 1)

    consumer.close()

    assert queued(broker) == list("bcd")


def test_a_closed_consumer_that_cannot_reach_redis_leaves_its_messages_to_the_next(broker_with: Brokers) -> None:
    broker = broker_with()
    publish(broker, *(a_bundle(id) for id in "abc"))
    consumer = a_consumer(broker)
    take(consumer, 1)
    pool = broker.client.connection_pool
    there = pool.connection_kwargs["port"]

    pool.connection_kwargs["port"] = 1
    pool.reset()
    with pytest.raises(dramatiq.ConnectionClosed):
        consumer.close()
    pool.connection_kwargs["port"] = there
    pool.reset()

    assert ids(take(a_consumer(broker), 2)) == ["b", "c"]


def test_what_no_thread_finished_in_time_goes_back_when_the_worker_stops(broker_with: Brokers) -> None:
    broker = broker_with(middleware=[RequeueWhatFails()])
    began, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        began.set()
        go_on.wait(20)

    dramatiq.actor(actor_name="hang", queue_name=QUEUE, broker=broker)(hang)
    publish(broker, *(a_bundle(id, "hang") for id in "abcd"))
    worker = dramatiq.Worker(broker, queues={QUEUE}, worker_threads=1, worker_timeout=100)
    worker.start()
    try:
        assert began.wait(5)
        worker.stop(timeout=200)

        assert queued(broker) == list("abcd")
    finally:
        go_on.set()


def test_messages_whose_fetch_reply_was_lost_are_found_again(broker_with: Brokers) -> None:
    broker = broker_with()
    publish(broker, *(a_bundle(id) for id in "abc"))
    in_hand = take(a_consumer(broker, prefetch=1), 1)
    broker.do_fetch(QUEUE, 2)  # and nobody hears the answer
    assert queued(broker) == []

    found = take(a_consumer(broker), 2)

    assert sorted(ids(found)) == ["b", "c"]
    assert ids(in_hand) == ["a"]


def test_a_message_that_cannot_be_read_stops_no_other(broker_with: Brokers) -> None:
    broker = broker_with()
    client: Any = broker.client
    publish(broker, QueuedBundle("nobody", QUEUE, "bad", b"{not json"), a_bundle("good"))

    assert ids(take(a_consumer(broker), 1)) == ["good"]

    assert queued(broker) == []
    assert client.zrange(f"{broker.namespace}:{QUEUE}.XQ", 0, -1) == [b"bad"]


def test_a_dead_worker_s_messages_are_requeued_and_a_living_one_s_are_not(broker_with: Brokers) -> None:
    dead, living, relay = broker_with(), broker_with(), broker_with(heartbeat_timeout=300)
    publish(relay, *(a_bundle(id) for id in "abcd"))
    take(a_consumer(dead, prefetch=2), 2)
    held = a_consumer(living, prefetch=2)
    take(held, 2)

    def reaped() -> bool:
        living.heartbeat(QUEUE)
        publisher_of(relay).reap()
        return sorted(queued(relay)) == ["a", "b"]

    eventually(reaped, 3, "the dead worker's messages")
    assert sorted(queued(relay)) == ["a", "b"]


def test_each_crash_is_counted_in_the_messages_of_the_dead_and_a_clean_return_is_not(broker_with: Brokers) -> None:
    relay = broker_with(heartbeat_timeout=200)
    publish(relay, a_bundle("a"))
    client: Any = relay.client
    message = client.hget(f"{relay.namespace}:{QUEUE}.msgs", "a")

    def crashes() -> dict[bytes, bytes]:
        assert client.hget(f"{relay.namespace}:{QUEUE}.msgs", "a") == message, "every byte is signed"
        return dict(client.hgetall(f"{relay.namespace}:{QUEUE}.crashes"))

    def requeued() -> bool:
        publisher_of(relay).reap()
        return queued(relay) == ["a"]

    assert crashes() == {}
    for number in (b"1", b"2"):
        take(a_consumer(broker_with()), 1)
        eventually(requeued, 5, "the dead worker's message")
        assert crashes() == {b"a": number}

    consumer = a_consumer(broker_with())
    relay.client.hset(f"{relay.namespace}:{QUEUE}.in_flight", "a", b"{}")
    (fetched,) = relay.await_and_fetch(QUEUE, 1, 0.1)
    assert fetched.crashes == 2
    relay.requeue(QUEUE, ["a"])
    assert not relay.client.exists(f"{relay.namespace}:{QUEUE}.in_flight"), "its mark outlives a clean return"
    consumer.requeue(take(consumer, 1))
    assert crashes() == {b"a": b"2"}


def test_a_relay_whose_clock_is_ahead_takes_no_living_worker_for_dead(
    broker_with: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    living, relay = broker_with(), broker_with(heartbeat_timeout=10_000)
    publish(relay, a_bundle("a"))
    take(a_consumer(living, prefetch=1), 1)
    ahead = current_millis() + 90_000

    monkeypatch.setattr("dramatiq.brokers.redis.current_millis", lambda: ahead)
    monkeypatch.setattr("dovecote.broker.broker.current_millis", lambda: ahead)
    publisher_of(relay).reap()

    assert queued(relay) == []


@pytest.mark.alone
def test_a_busy_worker_with_no_room_for_more_still_says_that_it_lives(broker_with: Brokers) -> None:
    busy, relay = broker_with(), broker_with(heartbeat_timeout=300)
    publish(relay, a_bundle("a"), a_bundle("b"))
    consumer = a_consumer(busy, prefetch=1, timeout=50)
    take(consumer, 1)

    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        assert next(consumer) is None
        publisher_of(relay).reap()

    assert queued(relay) == ["b"]


def test_an_actor_that_raises_has_its_message_requeued(broker_with: Brokers) -> None:
    broker = broker_with(middleware=[RequeueWhatFails(pause_seconds=0.01)])
    tried = []

    def fail_twice() -> None:
        tried.append(1)
        if len(tried) < 3:
            raise RuntimeError

    dramatiq.actor(actor_name="fail", queue_name=QUEUE, broker=broker)(fail_twice)
    publish(broker, a_bundle("a", "fail"))

    with working(broker):
        eventually(lambda: len(tried) == 3, 5, "the third try")
        eventually(lambda: broker.do_qsize(QUEUE) == 0, 5, "an acknowledged message")

    assert queued(broker) == []


def test_stopping_during_an_outage_gives_every_message_back_in_order(servers: Servers, tmp_path: Path) -> None:
    stopping = threading.Event()
    settings = settings_for("postgresql://nobody@127.0.0.1:1/nothing", servers.redis_url, tmp_path)
    broker = broker_for(settings, [_StopsWaiting(stopping), RequeueWhatFails(pause_seconds=0.01)])
    nowhere = sessions_for(connect("postgresql://nobody@127.0.0.1:1/nothing"))
    consumer = Consumer(nowhere, gateways_for(settings), stopping, outage_max_backoff_seconds=30)
    declare_handlers(broker, consumer, [a_route("test.note", queue=QUEUE)])
    broker.declare_queue(QUEUE)
    key = MessageKey.of("0" * 16, b"x" * 32)
    sent = [bundle(a_route("test.note", queue=QUEUE), [number], [b"{}"], key=key) for number in range(6)]
    try:
        publish(broker, *sent)

        with working(broker, threads=2):
            eventually(lambda: len(queued(broker)) == 2, 5, "four messages in hand")
            began = time.monotonic()
        assert time.monotonic() - began < 5

        assert sorted(queued(broker)) == sorted(one.id for one in sent)
        assert queued(broker) == [one.id for one in sent]
    finally:
        clean(broker)


def test_a_process_of_many_threads_holds_no_more_connections_than_it_may(servers: Servers) -> None:
    client = connect_redis(servers.redis_url, 5.0, max_connections=3)
    names = [f"dovecote-test-{uuid4().hex}"] * 40
    together = threading.Barrier(len(names))

    def ask(name: str) -> int:
        together.wait()
        client.client_setname(name)
        return sum(one["name"] == name for one in client.client_list())

    with ThreadPoolExecutor(len(names)) as threads:
        most = max(threads.map(ask, names))
    client.close()

    assert 1 <= most <= 3
