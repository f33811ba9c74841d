"""What a queue has lost comes back by itself, is counted, and nothing else is sent twice."""

import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any
from uuid import UUID

import orjson
import psycopg
import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import text

from dovecote.envelope.signatures import MessageKey, newest_key
from dovecote.exporter.metrics import RelayMetrics
from dovecote.relay.bundler import Bundler, bundle
from dovecote.relay.history import salt
from dovecote.relay.queue_search import QueueSearch
from dovecote.relay.reconciler import Reconciler
from dovecote.route import Route
from dovecote.telemetry.instrumentation import RelayInstrumentation
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.outbox_rows import Connection
from tests.support.processes import eventually
from tests.support.scraping import numbers_in
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

HANDLER = "test.note"


@pytest.fixture
def system_with(fresh_database_url: str, servers: Servers, tmp_path: Any) -> Iterator[Callable[..., System]]:
    systems: list[Any] = []

    def build(**more: Any) -> System:
        quick = {f"DOVECOTE_RELAY__{name}": "1" for name in ("RECONCILE_AFTER_SECONDS", "RETRY_LEASE_SECONDS")}
        settings = settings_for(fresh_database_url, servers.redis_url, tmp_path, **quick)
        route = a_route(HANDLER, **{"bundle_size": 2, "time_limit_seconds": 1, **more})
        systems.append(system_for(settings, [route]))
        system: System = systems[-1].__enter__()
        make_room_for_effects(system.engine)
        return system

    yield build
    for one in systems:
        one.__exit__(None, None, None)


class Counted(RelayInstrumentation):
    """Remembers what was sent again."""

    def __init__(self) -> None:
        self.events = 0

    def reconciled(self, handler: str, events: int) -> None:
        assert handler == HANDLER
        self.events += events


def key_of(system: System, name: str = "test") -> str:
    return f"{system.settings.redis.namespace}:{name}"


def messages_of(system: System) -> list[str]:
    """The ids on the queue, in order."""
    client: Any = system.broker.client
    return [id.decode() for id in client.lrange(key_of(system), 0, -1)]


def prices_queued(system: System) -> list[int]:
    client: Any = system.broker.client
    messages = [orjson.loads(client.hget(key_of(system, "test.msgs"), id)) for id in messages_of(system)]
    return [int(envelope["data"]["price"]) for message in messages for envelope in message["args"][0]]


def publish(system: System, events: int) -> list[str]:
    """Write quotes and have a relay publish them; return the messages. Afterwards no relay runs."""
    recorded = text("select coalesce(sum(events), 0) from dovecote.published_batches")

    def are_recorded() -> bool:
        with system.engine.connect() as connection:
            return bool(connection.scalar(recorded) == events)

    with system.relay():
        write_quotes(system, range(events))
        eventually(are_recorded, 10, "all of them recorded")
    return messages_of(system)


def execute(system: System, statement: str) -> None:
    with system.engine.begin() as connection:
        connection.execute(text(statement))


def published_long_ago(system: System, age: str = "1 hour") -> None:
    execute(system, f"update dovecote.published_batches set published_at = published_at - interval '{age}'")


def open_events(system: System) -> int:
    """How many positions are not known to be done."""
    statement = text(
        "select max((select last_value from dovecote.outbox_position) - low_water_mark) from dovecote.progress"
    )
    with system.engine.connect() as connection:
        return int(connection.scalar(statement) or 0)


def lose(system: System, id: str) -> None:
    client: Any = system.broker.client
    client.hdel(key_of(system, "test.msgs"), id)
    client.lrem(key_of(system), 0, id)


def lose_its_place(system: System, id: str) -> None:
    client: Any = system.broker.client
    assert client.lrem(key_of(system), 0, id) == 1


def key_of_system(system: System) -> MessageKey:
    with psycopg.connect(system.settings.database.url.get_secret_value()) as connection:
        return newest_key(connection)


class Looking:
    """The look of a leader, without one."""

    def __init__(self, system: System, routes: Collection[Route] | None = None) -> None:
        self.counted = Counted()
        self.sessions = 0
        self._system = system
        with system.engine.connect() as connection:
            self.epoch, history, self.upto = connection.execute(
                text(
                    "select epoch, history, (select last_value from dovecote.outbox_position) from dovecote.relay_state"
                )
            ).one()
        system.publisher.history = history
        self.reconciler = Reconciler(
            connect=self._connect,
            broker=system.publisher,
            bundler=Bundler(list(routes or system.routes), salt(history), key=key_of_system(system)),
            routes=list(routes or system.routes),
            settings=system.settings.relay,
            epoch=self.epoch,
            published_upto=lambda: self.upto,
            instrumentation=self.counted,
        )

    def _connect(self) -> Connection:
        self.sessions += 1
        return psycopg.connect(self._system.settings.database.url.get_secret_value(), autocommit=True)

    def look(self) -> int:
        """Return how many events were sent again by this look."""
        before = self.counted.events
        with self._connect() as connection:
            self.reconciler.look(connection, self.upto)
        return self.counted.events - before


def test_what_was_lost_by_hand_comes_back_by_itself_and_is_counted(system_with: Callable[..., System]) -> None:
    system, registry = system_with(), CollectorRegistry()
    client: Any = system.broker.client
    with system.relay(RelayMetrics(registry)):
        write_quotes(system, range(10))
        eventually(lambda: len(messages_of(system)) == 5, 10, "the messages")
        numbers = numbers_in(registry)
        assert numbers("dovecote_reconciled_events_total", handler=HANDLER) == 0
        gone, placeless, of_a_stranger, *_ = messages = messages_of(system)
        lose(system, gone)
        lose_its_place(system, placeless)
        # In the hands of a worker that nobody has ever heard of, so nobody takes it back.
        lose_its_place(system, of_a_stranger)
        client.sadd(f"{key_of(system, '__acks__')}.stranger.test", of_a_stranger)

        eventually(lambda: len(messages_of(system)) == 5, 10, "all messages again")

        eventually(lambda: numbers_in(registry)("dovecote_reconciled_events_total", handler=HANDLER) == 6, 5, "six")
        assert sorted(messages_of(system)) == sorted(messages)
        with system.workers():
            system.until_quiet()
    assert sorted(effect.price for effect in effects_in(system.engine)) == list(range(10))
    assert numbers_in(registry)("dovecote_reconciled_events_total", handler=HANDLER) == 6


def test_only_what_was_published_long_ago_is_looked_for(system_with: Callable[..., System]) -> None:
    system = system_with(time_limit_seconds=60)
    lose(system, publish(system, 4)[0])
    looking = Looking(system)
    published_long_ago(system, "30 seconds")

    assert looking.look() == 0

    published_long_ago(system)
    assert looking.look() == 2
    # It is given the same time again: it may be in any message by now.
    lose(system, messages_of(system)[-1])
    assert looking.look() == 0


def test_what_is_in_hand_or_in_another_message_is_not_lost(system_with: Callable[..., System]) -> None:
    system = system_with()
    publish(system, 20)
    published_long_ago(system)
    taken = system.broker.do_fetch("test", 2)

    # A deploy has changed the size: the same events would go in messages with other ids.
    looking = Looking(system, [a_route(HANDLER, bundle_size=5, time_limit_seconds=1)])

    assert len(taken) == 2
    assert looking.look() == 0
    assert len(messages_of(system)) == 8


def test_what_is_in_messages_that_nobody_acts_on_for_it_is_lost(system_with: Callable[..., System]) -> None:
    system = system_with()
    (lost,) = publish(system, 2)
    client: Any = system.broker.client
    message = orjson.loads(client.hget(key_of(system, "test.msgs"), lost))
    envelopes = [orjson.dumps(envelope) for envelope in message["args"][0]]
    key = key_of_system(system)
    others = [
        # What is not on record as failed is left alone by a retry, and what is not acted on by a replay. And another
        # handler's message on the same queue is not ours.
        bundle(system.routes[0], [1], envelopes, retry=True, key=key),
        bundle(system.routes[0], [2], envelopes, replay=UUID(int=1), key=key),
        bundle(a_route("test.other"), [3], envelopes, key=key),
        # Nor is one that no relay has signed.
        bundle(system.routes[0], [4], envelopes),
    ]
    looking = Looking(system)
    system.publisher.publish(looking.epoch, others)
    lose(system, lost)
    published_long_ago(system)

    assert looking.look() == 2
    assert messages_of(system) == [*(one.id for one in others), lost]


def test_a_message_that_somebody_will_get_is_not_put_back(
    system_with: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = system_with()
    queued, taken, placeless = publish(system, 6)
    client: Any = system.broker.client
    lose_its_place(system, taken)
    client.rpush(key_of(system), queued)
    client.lrem(key_of(system), 1, queued)
    client.lpush(key_of(system), taken)
    system.broker.do_fetch("test", 1)
    lose_its_place(system, placeless)
    epoch, places = Looking(system).epoch, QueueSearch(system.publisher)

    def is_put_back(id: str, epoch: int = epoch) -> bool:
        return places.requeue(epoch, "test", HANDLER, id)

    assert not is_put_back(queued)
    assert not is_put_back(taken)
    assert not is_put_back(placeless, epoch - 1)
    client.rpush(key_of(system, f"test.held.{HANDLER}"), placeless)
    assert not is_put_back(placeless)
    client.delete(key_of(system, f"test.held.{HANDLER}"))
    assert is_put_back(placeless)
    lose(system, placeless)
    assert not is_put_back(placeless)
    assert messages_of(system) == [queued]
    monkeypatch.setattr("dovecote.relay.queue_search._IDS", 1)
    client.rpush(key_of(system), "behind")
    assert not is_put_back(queued), "it is at the head"


def test_what_stays_at_the_head_hides_nothing_behind_it(
    system_with: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, events in (("_READ_EVENTS", 4), ("_ASKED_EVENTS", 2)):
        monkeypatch.setattr(f"dovecote.relay.reconciler.{name}", events)
    system = system_with()
    messages = publish(system, 20)
    published_long_ago(system)
    looking = Looking(system)
    lose(system, messages[6])
    lose_its_place(system, messages[8])

    def all_are_back() -> bool:
        looking.look()
        return sorted(messages_of(system)) == sorted(messages)

    eventually(all_are_back, 20, "both messages")


def test_a_quiet_system_is_not_asked_anything(
    system_with: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovecote.relay.reconciler._MIN_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("dovecote.relay.reconciler._MAX_PAUSE_SECONDS", 0.01)
    system = system_with()
    with system.running():
        write_quotes(system, range(4))
        system.until_quiet()
        eventually(lambda: open_events(system) == 0, 10, "marks that have moved")
    looking = Looking(system)

    with looking.reconciler:
        eventually(lambda: looking.sessions == 1, 5, "a look")
        threading.Event().wait(0.3)  # a span of time: nothing is to happen in it

        assert looking.sessions == 1
        looking.upto += 1
        eventually(lambda: looking.sessions > 1, 5, "another look")


def test_a_message_in_the_middle_of_a_long_queue_is_not_lost(
    system_with: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovecote.relay.queue_search._IDS", 3)
    system = system_with()
    messages = publish(system, 40)
    published_long_ago(system)
    looking = Looking(system)
    assert looking.look() == 0

    lose_its_place(system, messages[10])
    lose(system, messages[15])
    with monkeypatch.context() as patch:
        patch.setattr("dovecote.relay.queue_search._MAX_READ_BYTES", 5_000)
        assert looking.look() == 0, "it was read whole, however long it is"
    assert looking.look() == 0, "it is read again at once, however long it was"

    assert Looking(system).look() == 4
    assert sorted(messages_of(system)) == sorted(messages)


def test_what_a_worker_finishes_during_reconciling_is_not_lost(system_with: Callable[..., System]) -> None:
    system = system_with()
    publish(system, 6)
    published_long_ago(system)
    looking = Looking(system)

    class Finished(QueueSearch):
        """All of it is acted on and acknowledged between the first question to Postgres and that to Redis."""

        def not_queued(self, queue: str, handler: str, events: Collection[UUID]) -> set[UUID]:
            assert len(events) == 6
            with system.workers():
                system.until_quiet()
                eventually(lambda: not system.publisher.holds_messages("test"), 5, "all acknowledged")
            left = super().not_queued(queue, handler, events)
            assert left == set(events)
            return left

    looking.reconciler._queued = Finished(system.publisher)

    assert looking.look() == 0
    assert messages_of(system) == []


@pytest.mark.parametrize(
    "state",
    [
        f"insert into dovecote.paused_handlers (handler_name, actor, reason) values ('{HANDLER}', 'test', 'test')",
        f"insert into dovecote.postponed (handler_name, after_position) values ('{HANDLER}', 0)",
        "insert into dovecote.replays (handler_name, mode, filter, upto_position, state, actor, reason)"
        f" values ('{HANDLER}', 'backfill', '{{}}', 9, 'running', 'test', 'test')",
        "update dovecote.relay_state set redis_run_id = null",
    ],
    ids=["paused", "postponed", "replayed", "being sent again"],
)
def test_a_handler_that_waits_for_something_else_is_left_alone(system_with: Callable[..., System], state: str) -> None:
    system = system_with()
    for id in publish(system, 4):
        lose(system, id)
    published_long_ago(system)
    execute(system, state)

    assert Looking(system).look() == 0


def test_what_is_held_and_comes_back_soon_is_not_lost(system_with: Callable[..., System]) -> None:
    system = system_with()
    publish(system, 4)
    published_long_ago(system)
    client: Any = system.broker.client
    client.rename(key_of(system), key_of(system, f"test.held.{HANDLER}"))

    # A deploy has changed the size: the same events would go in messages with other ids.
    assert Looking(system, [a_route(HANDLER, bundle_size=5, time_limit_seconds=1)]).look() == 0
    assert messages_of(system) == []


def test_an_ordered_handler_acts_in_order_on_what_comes_late(system_with: Callable[..., System]) -> None:
    system = system_with(ordered=True)
    first, *_ = publish(system, 8)
    lose(system, first)
    with system.workers():
        eventually(lambda: not messages_of(system) and not system.publisher.holds_messages("test"), 10, "all taken")
        assert effects_in(system.engine) == []
        published_long_ago(system)

        assert Looking(system).look() == 2

        with system.relay():
            system.until_quiet()
    assert [effect.price for effect in effects_in(system.engine)] == list(range(8))
