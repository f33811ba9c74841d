"""A route names another queue since a deploy: what was queued or held on the old one is moved, in order, once."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest

from dovecote.bootstrap import broker_for
from dovecote.broker.broker import OutboxBroker
from dovecote.broker.publisher import QueuedBundle
from dovecote.errors import NewerRelay, RedisLost
from dovecote.operations.handlers import pause, resume
from dovecote.relay import renamed_queues
from dovecote.relay.bundler import bundle
from dovecote.relay.renamed_queues import RenamedQueues
from dovecote.route import Route
from dovecote.settings import Settings
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, claim, publisher_of, system_for

pytestmark = pytest.mark.servers

OLD, NEW = a_route("test.note", queue="old"), a_route("test.note", queue="new")


@pytest.fixture
def broker(servers: Servers, tmp_path: Any) -> Iterator[OutboxBroker]:
    settings = settings_for("postgresql://nobody@127.0.0.1:1/none", servers.redis_url, tmp_path)
    broker = broker_for(settings, [])
    assert claim(publisher_of(broker), 1)
    yield broker
    for key in broker.client.scan_iter(f"{broker.namespace}:*"):
        broker.client.delete(key)
    broker.client.close()


def messages(route: Route, numbers: Sequence[int], size: int = 10) -> list[QueuedBundle]:
    return [bundle(route, [number], [b'{"n":%d,"padding":"%s"}' % (number, b"x" * size)]) for number in numbers]


def redis_of(broker: OutboxBroker) -> Any:
    return broker.client


def numbers_in(broker: OutboxBroker, name: str, queue: str | None = None) -> list[int]:
    """The messages of a list."""
    found = []
    for id in redis_of(broker).lrange(f"{broker.namespace}:{name}", 0, -1):
        message = orjson.loads(redis_of(broker).hget(f"{broker.namespace}:{queue or name}.msgs", id))
        found.append(message["args"][0][0]["n"])
    return found


def keys(broker: OutboxBroker, pattern: str) -> list[bytes]:
    return sorted(redis_of(broker).scan_iter(f"{broker.namespace}:{pattern}"))


def move(broker: OutboxBroker, *routes: Route, epoch: int = 1) -> RenamedQueues:
    renamed = RenamedQueues(publisher_of(broker), routes, epoch)
    renamed.step()
    while renamed._work is not None:
        renamed.step()
    return renamed


def hold(broker: OutboxBroker, route: Route, numbers: Sequence[int]) -> None:
    publisher_of(broker).publish(1, messages(route, numbers))
    fetched = broker.await_and_fetch(route.queue, len(numbers), 0.1)
    broker.hold(route.queue, route.handler, [one.id.decode() for one in fetched])


def test_what_is_queued_goes_before_what_is_newer_and_once(broker: OutboxBroker) -> None:
    publisher_of(broker).publish(1, messages(OLD, range(5)))
    publisher_of(broker).publish(1, messages(NEW, [3, 7, 8]))  # 3 was sent again meanwhile

    move(broker, NEW)

    assert numbers_in(broker, "new") == [0, 1, 2, 4, 3, 7, 8]
    assert keys(broker, "old*") == []


def test_more_than_a_call_moves_stays_in_order(broker: OutboxBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed_queues, "_MAX_MESSAGES", 4)
    monkeypatch.setattr(renamed_queues, "_STEP_SECONDS", 0)
    monkeypatch.setattr(renamed_queues, "_KEYS_OF_A_PAGE", 1)
    publisher_of(broker).publish(1, messages(OLD, range(10)))
    hold(broker, a_route("test.other", queue="old2"), range(10, 20))

    move(broker, NEW, a_route("test.other", queue="new2"))

    assert numbers_in(broker, "new") == list(range(10))
    assert numbers_in(broker, "new2.held.test.other", "new2") == list(range(10, 20))
    assert keys(broker, "old*") == []


def test_what_a_call_moves_is_bounded_in_bytes(broker: OutboxBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed_queues, "_MAX_BYTES", 3_500)
    monkeypatch.setattr(renamed_queues, "_STEP_SECONDS", 0)
    publisher_of(broker).publish(1, messages(OLD, range(9), size=1_000))
    renamed = RenamedQueues(publisher_of(broker), [NEW], 1)
    left: list[int] = []
    while not left or renamed._work is not None:
        renamed.step()
        left.append(redis_of(broker).llen(f"{broker.namespace}:old"))

    assert sorted(set(left), reverse=True) == [9, 6, 3, 0]
    assert numbers_in(broker, "new") == list(range(9))


def test_what_is_held_goes_to_what_is_held_today(broker: OutboxBroker) -> None:
    hold(broker, OLD, [1, 2])
    hold(broker, NEW, [3])

    move(broker, NEW)

    assert numbers_in(broker, "new.held.test.note", "new") == [1, 2, 3]
    assert keys(broker, "old*") == []


def test_of_two_handlers_on_a_queue_only_the_one_that_left_is_moved(broker: OutboxBroker) -> None:
    stays, leaves = a_route("test.stays", queue="old"), OLD
    publisher_of(broker).publish(
        1, [*messages(stays, [1]), *messages(leaves, [2]), *messages(stays, [3]), *messages(leaves, [4])]
    )
    (delayed,) = messages(leaves, [5])
    message = delayed.message.replace(b'"old"', b'"old.DQ"', 1)
    publisher_of(broker).publish(1, [replace(delayed, queue="old.DQ", message=message)])

    move(broker, stays, NEW)

    assert numbers_in(broker, "old") == [1, 3]
    assert numbers_in(broker, "new") == [2, 4]
    assert numbers_in(broker, "new.DQ") == [5]


def test_what_no_route_has_and_what_is_not_ours_keeps_its_place(broker: OutboxBroker) -> None:
    publisher_of(broker).publish(1, messages(a_route("gone.handler", queue="old"), [1]))
    unsigned = b'{"queue_name":"old","actor_name":"test.note"}'
    foreign = {"unsigned": unsigned, "other": b"\x80 not JSON"}
    for id, message in foreign.items():
        redis_of(broker).hset(f"{broker.namespace}:old.msgs", id, message)
        redis_of(broker).rpush(f"{broker.namespace}:old", id)
    publisher_of(broker).publish(1, messages(OLD, [2]))
    before = redis_of(broker).lrange(f"{broker.namespace}:old", 0, -1)

    move(broker, NEW)

    assert redis_of(broker).lrange(f"{broker.namespace}:old", 0, -1) == [before[0], b"other"]
    # Its consumer judges what it is; here it is for our handler.
    assert redis_of(broker).lrange(f"{broker.namespace}:new", 0, -1) == [b"unsigned", before[3]]
    assert redis_of(broker).hget(f"{broker.namespace}:new.msgs", "unsigned") == unsigned, "every byte is signed"


def test_a_message_in_a_living_workers_hands_stays_there(broker: OutboxBroker) -> None:
    publisher_of(broker).publish(1, messages(OLD, [1, 2]))
    broker.await_and_fetch("old", 1, 0.1)

    renamed = move(broker, NEW)

    assert numbers_in(broker, "new") == [2]
    assert redis_of(broker).hlen(f"{broker.namespace}:old.msgs") == 1
    assert renamed.next_look < time.monotonic() + 10, "its worker may requeue it"


def test_what_a_dead_worker_held_of_the_old_queue_is_requeued_and_remembers_the_crash(broker: OutboxBroker) -> None:
    publisher_of(broker).publish(1, messages(OLD, [1]))
    broker.await_and_fetch("old", 1, 0.1)
    (id,) = redis_of(broker).hkeys(f"{broker.namespace}:old.msgs")
    redis_of(broker).hset(f"{broker.namespace}:old.in_flight", id, "{}")
    redis_of(broker).zadd(f"{broker.namespace}:__heartbeats__", {broker.broker_id: 1})

    move(broker, NEW)

    assert redis_of(broker).hgetall(f"{broker.namespace}:new.crashes") == {id: b"1"}
    assert redis_of(broker).hgetall(f"{broker.namespace}:new.in_flight") == {id: b"{}"}


def test_only_the_newest_relay_moves_anything(broker: OutboxBroker) -> None:
    publisher_of(broker).publish(1, messages(OLD, [1]))
    assert claim(publisher_of(broker), 2)

    with pytest.raises(NewerRelay):
        move(broker, NEW, epoch=1)
    with pytest.raises(RedisLost):
        move(broker, NEW, epoch=3)

    assert numbers_in(broker, "old") == [1]


# With relays and workers --------------------------------------------------------------------------


@pytest.fixture
def before(settings: Settings) -> Iterator[System]:
    """A system from before the deploy, its relay stopped, with five events on the old queue, one a message."""
    with system_for(settings, [a_route("test.note", queue="old", ordered=True, bundle_size=1)]) as system:
        make_room_for_effects(system.engine)
        with system.relay():
            write_quotes(system, range(5))
            eventually(lambda: redis_of(system.broker).llen(f"{settings.redis.namespace}:old") == 5, 10, "all queued")
        yield system


def deployed(before: System) -> Any:
    return system_for(before.settings, [a_route("test.note", queue="new", ordered=True, bundle_size=1)])


def test_a_deploy_that_renames_a_queue_strands_nothing(before: System) -> None:
    with deployed(before) as system, system.running():
        write_quotes(system, [5])
        system.until_quiet()

        assert [effect.price for effect in effects_in(system.engine)] == list(range(6))
        assert keys(system.broker, "old*") == []


def test_a_handler_that_is_resumed_on_another_queue_goes_on_with_what_was_held(before: System) -> None:
    pause(before.engine, before.routes, "test.note", actor="ada", reason="a look")
    with before.workers():
        eventually(lambda: keys(before.broker, "old.held.test.note"), 10, "held")
        eventually(lambda: not keys(before.broker, "old"), 10, "all of it")

    with deployed(before) as system, system.running():
        eventually(lambda: keys(system.broker, "new.held.test.note"), 10, "moved while it is paused")
        resume(system.engine, system.routes, "test.note", actor="ada")
        system.until_quiet()

        assert [effect.price for effect in effects_in(system.engine)] == list(range(5))


def test_what_workers_of_older_code_hold_after_the_deploy_follows_when_it_is_resumed(before: System) -> None:
    with deployed(before) as system:
        pause(system.engine, system.routes, "test.note", actor="ada", reason="a look")
        broker_of_old_code = broker_for(before.settings, [])
        fetched = broker_of_old_code.await_and_fetch("old", 5, 0.1)
        ids = [one.id.decode() for one in fetched]
        with system.running():
            eventually(lambda: system.status().relay.leading, 10, "a leader")
            eventually(
                lambda: redis_of(system.broker).exists(f"{system.broker.namespace}:__relay__"), 10, "a verified Redis"
            )
            broker_of_old_code.hold("old", "test.note", ids)
            resume(system.engine, system.routes, "test.note", actor="ada")
            system.until_quiet()

        assert [effect.price for effect in effects_in(system.engine)] == list(range(5))
