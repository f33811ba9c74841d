"""What is large, never ends or comes again in Redis: by somebody who can write there, and has kept what he saw."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import UUID

import psycopg
import pytest

from dovecote.events.ids import uuid7
from dovecote.migrations import schema
from dovecote.relay.bundler import bundle
from dovecote.relay.fence import RedisFence
from dovecote.relay.renamed_queues import RenamedQueues
from tests.security.attacked import ENVELOPE, NOTE, Attacked, attacked
from tests.support.effects import effects_in
from tests.support.processes import eventually
from tests.support.system import publisher_of

__all__ = ["attacked"]

LARGE = 1_000_000


@contextmanager
def what_is_fetched(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note how many bytes of ids and counts come out of Redis with a fetch."""
    sizes: list[int] = []
    fetch = attacked.system.broker.await_and_fetch

    def noted(queue: str, most: int, wait_seconds: float) -> object:
        fetched = fetch(queue, most, wait_seconds)
        sizes.extend(len(one.id) for one in fetched)
        return fetched

    monkeypatch.setattr(attacked.system.broker, "await_and_fetch", noted)
    yield sizes


@pytest.mark.servers
def test_an_id_of_any_size_is_taken_away_and_not_carried_to_a_consumer(
    attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some ids of 100 MB held Redis for 10 s a fetch, and consumers fetched them for ever: no answer came in time."""
    with what_is_fetched(attacked, monkeypatch) as sizes:
        reasons = attacked.refusals_of(lambda: [attacked.put("test", b"x", bytes([65 + n]) * LARGE) for n in range(4)])

    assert reasons == {"too_large"}
    assert sizes
    assert max(sizes) <= 200
    attacked.honest_event_is_acted_on()


@pytest.mark.servers
def test_a_count_of_crashes_of_any_size_is_not_carried_to_a_consumer(attacked: Attacked) -> None:
    broker = attacked.system.broker
    attacked.redis.hset(f"{attacked.prefix}elsewhere.crashes", "m", b"9" * LARGE)
    attacked.put("elsewhere", b"{}", "m")
    attacked.put("elsewhere", b"{}", "n")

    before = attacked.redis.info("stats")["total_net_output_bytes"]
    found = broker.await_and_fetch("elsewhere", 5, 0.1)
    sent = attacked.redis.info("stats")["total_net_output_bytes"] - before

    assert [(one.id, one.crashes) for one in found] == [(b"m", 1), (b"n", 0)]
    assert sent < LARGE / 2


@pytest.mark.servers
@pytest.mark.parametrize("field", ["history", "instance", "seen"])
def test_a_marker_of_any_size_does_not_fill_the_relay(attacked: Attacked, field: str) -> None:
    attacked.redis.hset(f"{attacked.prefix}__relay__.history", field, b"9" * LARGE)

    before = attacked.redis.info("stats")["total_net_output_bytes"]
    RedisFence(attacked.system.publisher).read()

    assert attacked.redis.info("stats")["total_net_output_bytes"] - before < LARGE / 2
    attacked.honest_event_is_acted_on(within_seconds=20)


@pytest.mark.servers
@pytest.mark.parametrize("heartbeat", [float("-inf"), -1, 9e15, float("inf")])
def test_who_is_made_up_and_never_dies_holds_no_message(attacked: Attacked, heartbeat: float) -> None:
    """With a heartbeat in the far future, or before all time, it was alive for ever, and so was what it held."""
    broker, queue = attacked.system.broker, "test"
    attacked.redis.hset(f"{attacked.prefix}{queue}.msgs", "kept", b"junk")
    attacked.redis.sadd(f"{attacked.prefix}__acks__.nobody.{queue}", "kept")
    attacked.redis.zadd(f"{attacked.prefix}__heartbeats__", {"nobody": heartbeat})

    publisher_of(broker).reap([queue])

    assert not attacked.redis.exists(f"{attacked.prefix}__acks__.nobody.{queue}")
    eventually(attacked.is_gone, 5, "the message to be taken, and refused")
    assert attacked.redis.zscore(f"{attacked.prefix}__heartbeats__", broker.broker_id), "the living stay"


def an_event_of(days_ago: float) -> UUID:
    milliseconds = int((time.time() - days_ago * 86_400) * 1_000)
    return UUID(int=milliseconds << 80 | uuid7().int & (1 << 80) - 1)


@pytest.mark.servers
def test_a_message_that_was_kept_until_its_week_was_dropped_is_not_acted_on_again(attacked: Attacked) -> None:
    """It is signed, and of this run of Postgres; neither the outbox nor processed_events knows its event any more."""
    event, price = an_event_of(days_ago=40), 777_001
    envelope = ENVELOPE.replace(ENVELOPE[23:59], str(event).encode()).replace(
        b'{"symbol": "EUR"}',
        b'{"symbol": "EUR", "price": "%d", "as_of": "2026-11-20T12:00:00Z", "occurred_at": "2026-11-20T12:00:00Z"}'
        % price,
    )
    with attacked.postgres() as connection:
        (run,) = connection.execute("select dovecote.outbox_run()").fetchone() or ("",)
    kept = bundle(NOTE, [1], [envelope], sent_in=run, key=attacked.key)

    attacked.put(kept.queue, kept.message, kept.id)
    eventually(lambda: attacked.is_gone(kept.queue), 10, "the message to be taken")

    assert price not in {effect.price for effect in effects_in(attacked.system.engine)}
    with attacked.postgres() as connection:
        for table in ("processed_events", "deliveries"):
            assert not connection.execute(f"select from dovecote.{table} where event_id = %s", (event,)).fetchall()


@pytest.mark.servers
def test_made_up_queues_cost_the_relay_a_bounded_look(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look asked about all in one go, remembered each, and ended with the first of another type: so did the relay."""
    there = [f"__acks__.nobody.made-up-{number}" for number in range(3_000)]
    there += [f"made-up-{number}.msgs" for number in range(3_000)]
    with attacked.redis.pipeline(transaction=False) as pipeline:
        for name in there:
            pipeline.geoadd(f"{attacked.prefix}{name}", [1, 1, "x"])
        pipeline.execute()
    asked: list[int] = []
    reap = attacked.system.publisher.reap

    def noted(names: Sequence[str]) -> int:
        asked.append(len(names))
        return reap(names)

    monkeypatch.setattr(attacked.system.publisher, "reap", noted)
    renamed = RenamedQueues(
        attacked.system.publisher, attacked.system.routes, int(attacked.redis.get(f"{attacked.prefix}__relay__"))
    )

    while not renamed.next_look:
        renamed.step()
    attacked.redis.delete(*(f"{attacked.prefix}{name}" for name in there))

    assert max(asked) <= 20
    assert sum(asked) <= 1_100
    attacked.honest_event_is_acted_on()


@pytest.mark.once
@pytest.mark.servers
def test_a_system_of_ones_own_lets_no_stranger_in(fresh_database_url: str) -> None:
    """`dovecote up` ended before it had begun: the percent sign of format() was taken for a parameter's."""
    schema.keep_strangers_out(fresh_database_url)

    with psycopg.connect(fresh_database_url, autocommit=True) as connection:
        (connects,) = connection.execute(
            "select has_database_privilege('public', current_database(), 'connect')"
        ).fetchone() or (True,)
    assert not connects
