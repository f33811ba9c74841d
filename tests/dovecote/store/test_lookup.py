"""What is not in the outbox is not acted on, and leaves nothing behind; what is acted on is committed durably."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url, text
from structlog.testing import capture_logs

from domain.pricing import PriceQuoted
from dovecote.consumer.consumer import Consumer
from dovecote.consumer.retrying import Stopping
from dovecote.consumer.stuck import _record as record_of_stuck
from dovecote.consumer.time_limits import Watch
from dovecote.envelope import Envelope
from dovecote.envelope.signatures import newest_key
from dovecote.envelope.wire import TAIL_BYTES
from dovecote.relay.bundler import Bundler
from dovecote.settings import Settings
from dovecote.store.bundle import Bundle
from dovecote.telemetry.instrumentation import ConsumerInstrumentation
from dovecote.unit_of_work import UnitOfWork
from tests.conftest import Servers, settings_for
from tests.dovecote.consumer.test_consumer import FOR_EVER, Bench, Failing, bench
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.pooling import PGBOUNCER, pooled_url
from tests.support.processes import eventually
from tests.support.system import System, system_for

__all__ = ["bench"]
pytestmark = pytest.mark.servers

ANOTHER_RUN = "1 base/1/1"


class Counting(ConsumerInstrumentation):
    def __init__(self) -> None:
        self.passed_over = 0

    def phantoms(self, handler: str, events: int) -> None:
        self.passed_over += events


@dataclass
class Looking:
    """A bench whose consumer counts what it passes over."""

    bench: Bench
    instrumentation: Counting = field(default_factory=Counting)

    def __post_init__(self) -> None:
        self.consumer = Consumer(
            self.bench.sessions,
            self.bench.gateways,
            self.bench.stopping,
            0.05,
            None,
            self.instrumentation,
            keyring=self.bench.gateways.keyring,
        )

    def forget(self, envelope: Envelope) -> Envelope:
        """Do what a restore does: the event is gone, and its message is not."""
        self.execute("delete from dovecote.outbox where id = :id", id=envelope.event_id)
        return envelope

    def execute(self, statement: str, **parameters: object) -> None:
        with self.bench.engine.begin() as connection:
            connection.execute(text(statement), parameters)

    def prices(self) -> list[int]:
        return [effect.price for effect in effects_in(self.bench.engine)]

    def marks_and_deliveries_of(self, envelope: Envelope) -> int:
        with self.bench.engine.connect() as connection:
            count = connection.scalar(
                text(
                    "select (select count(*) from dovecote.processed_events where event_id = :id)"
                    " + (select count(*) from dovecote.deliveries where event_id = :id)"
                ),
                {"id": envelope.event_id},
            )
            return int(count)


@pytest.fixture
def looking(bench: Bench) -> Looking:
    return Looking(bench)


# Passed over --------------------------------------------------------------------------------------

ABSENT: dict[str, Callable[[Looking, Envelope], Envelope]] = {
    "forgotten": lambda looking, envelope: looking.forget(envelope),
    "another id": lambda _, envelope: replace(envelope, event_id=uuid4()),
    "another position": lambda _, envelope: replace(envelope, position=envelope.position + 1_000),
    "another type": lambda _, envelope: replace(envelope, type="pricing.price_quoted.v2"),
    "no position of any event": lambda _, envelope: replace(envelope, position=2**70),
    "no type of any event": lambda _, envelope: replace(envelope, type="pricing.price\0quoted.v1"),
    "unreadable, and forgotten": lambda looking, envelope: replace(
        looking.forget(envelope), data={}, unreadable="a number too large"
    ),
}


@pytest.mark.parametrize("ordered", [False, True], ids=["in any order", "in order"])
@pytest.mark.parametrize("absent", ABSENT)
def test_what_is_not_in_the_outbox_is_passed_over_and_its_neighbours_are_not(
    looking: Looking, absent: str, ordered: bool
) -> None:
    first, second, third = (envelope for n in (1, 2, 3) for envelope in looking.bench.write(n, symbol=f"S{n}"))
    phantom = ABSENT[absent](looking, second)

    with capture_logs() as logs:
        looking.consumer.consume(Bundle(a_route(ordered=ordered), [first, phantom, third], sent_in=ANOTHER_RUN))

    assert sorted(looking.prices()) == [1, 3]
    assert looking.marks_and_deliveries_of(phantom) == 0
    assert looking.instrumentation.passed_over == 1
    logged = [line for line in logs if "not in the outbox" in line["event"]]
    assert [(line["handler"], line["event_id"], line["position"]) for line in logged] == [
        ("test.note", str(phantom.event_id), phantom.position)
    ]


@pytest.mark.parametrize("ordered", [False, True], ids=["in any order", "in order"])
def test_a_retry_of_what_is_not_in_the_outbox_is_passed_over(looking: Looking, ordered: bool) -> None:
    written = [*looking.bench.write(1, symbol="A"), *looking.bench.write(2, symbol="B")]
    looking.consumer.consume(Bundle(a_route(function=Failing({1: FOR_EVER, 2: FOR_EVER}), ordered=ordered), written))
    looking.forget(written[0])

    looking.consumer.consume(Bundle(a_route(ordered=ordered), written, retry=True))

    assert looking.prices() == [2]
    assert looking.instrumentation.passed_over == 1
    assert looking.bench.states() == [("A", "retrying")], "for the operator, or the relay, to clear away"


def test_a_replay_of_what_is_not_in_the_outbox_is_passed_over(looking: Looking) -> None:
    written = looking.bench.write(1, 2)
    looking.consumer.consume(Bundle(a_route(), written))
    replay = looking.bench.replay_again()
    looking.forget(written[0])

    looking.consumer.consume(Bundle(a_route(ordered=True), written, replay=replay))

    assert looking.prices() == [1, 2, 2]
    assert looking.bench.deliveries() == []


def test_code_that_has_no_route_for_what_is_not_in_the_outbox_keeps_nothing_of_it(looking: Looking) -> None:
    phantom, made_by_hand, there = looking.bench.write(1, 2, 3)
    looking.forget(phantom)
    bundle = [phantom, replace(made_by_hand, type="no\0type"), there]

    looking.consumer.keep_for_other_code(Bundle(a_route(), bundle, sent_in=ANOTHER_RUN))

    assert [delivery.position for delivery in looking.bench.deliveries()] == [there.position]
    assert looking.instrumentation.passed_over == 2


def test_an_event_that_is_forgotten_while_its_handler_fails_gets_no_delivery(looking: Looking) -> None:
    (envelope,) = looking.bench.write(1)

    def fails(_event: object, _uow: UnitOfWork, _gateways: object) -> None:
        looking.forget(envelope)
        raise RuntimeError

    looking.consumer.consume(Bundle(a_route(function=fails), [envelope]))

    assert looking.bench.deliveries() == []
    assert looking.instrumentation.passed_over == 1


def test_an_event_that_is_forgotten_while_its_handler_is_stuck_gets_no_delivery(looking: Looking) -> None:
    there, phantom = looking.bench.write(1, 2)
    looking.forget(phantom)

    for envelope in (there, phantom):
        with looking.bench.sessions() as stuck:
            record_of_stuck(looking.bench.sessions, Watch(a_route(), stuck), envelope, TimeoutError())

    assert [delivery.position for delivery in looking.bench.deliveries()] == [there.position]


# The run of Postgres ------------------------------------------------------------------------------


def test_the_outbox_is_not_asked_about_what_was_sent_in_this_run_of_postgres(looking: Looking) -> None:
    looking.execute(
        """
        create or replace function dovecote.not_in_outbox(event_ids uuid[], positions bigint[], event_types text[])
        returns setof uuid language plpgsql stable as $$ begin raise division_by_zero; end $$
        """
    )
    with looking.bench.engine.connect() as connection:
        this_run = connection.scalar(text("select dovecote.outbox_run()"))

    for route in (a_route(), a_route("test.ordered", ordered=True)):
        looking.consumer.consume(Bundle(route, looking.bench.write(1, symbol=route.handler), sent_in=this_run))

    assert looking.prices() == [1, 1]


def test_a_copy_of_the_database_is_another_run(looking: Looking) -> None:
    looking.bench.engine.dispose()
    copied = f"{make_url(looking.bench.url).database}_copy"
    runs = set()
    with psycopg.connect(make_url(looking.bench.url).set(database="postgres").render_as_string(False)) as connection:
        connection.autocommit = True
        connection.execute(f"create database {copied} template {make_url(looking.bench.url).database}")
        for name in (looking.bench.url, make_url(looking.bench.url).set(database=copied).render_as_string(False)):
            with psycopg.connect(name) as database:
                runs.update(database.execute("select dovecote.outbox_run()").fetchall())
        connection.execute(f"drop database {copied}")

    assert len(runs) == 2


def test_the_run_is_no_part_of_a_messages_id() -> None:
    rows = [(1, "pricing.price_quoted.v1", b'{"specversion":"1.0","id":"0190163d-8694-739b-aea5-966c26f8ad91"}')]

    sent, again = (next(Bundler([a_route()], sent_in=run).bundles(rows)) for run in ("7 a", "8 b"))

    assert sent.id == again.id
    assert b'"sent_in":"7 a"}' in sent.message


def _of_another_run(system: System, message: bytes, this_run: str) -> bytes:
    """The message as a relay signs it in that run."""
    assert message.count(this_run.encode()) == 1, "the relay says in which run of Postgres it has read the events"
    with psycopg.connect(system.settings.database.url.get_secret_value()) as connection:
        key = newest_key(connection)
    return key.signed(message[:-TAIL_BYTES].replace(this_run.encode(), ANOTHER_RUN.encode()))


@pytest.mark.parametrize("ordered", [False, True], ids=["in any order", "in order"])
def test_messages_that_outlive_their_events_are_acknowledged_and_nothing_else(
    settings: Settings, ordered: bool
) -> None:
    with system_for(settings, [a_route(ordered=ordered, bundle_size=2)]) as system:
        make_room_for_effects(system.engine)
        client: Any = system.broker.client
        queue = f"{settings.redis.namespace}:test.msgs"
        with system.relay():
            write_quotes(system, [1, 2, 3, 4, 5])
            eventually(lambda: client.hlen(queue) == 3, 10, "all to be published")
        with system.engine.begin() as connection:
            this_run = connection.scalar(text("select dovecote.outbox_run()"))
            connection.execute(text("delete from dovecote.outbox where payload ->> 'price' in ('2', '5')"))
        for id, message in client.hgetall(queue).items():
            client.hset(queue, id, _of_another_run(system, message, this_run))

        with system.workers():
            eventually(lambda: not client.exists(queue), 10, "every message to be acknowledged")

        assert sorted(effect.price for effect in effects_in(system.engine)) == [1, 3, 4]


# A consumer that was left behind on a primary that was replaced -----------------------------------


@pytest.mark.parametrize("ordered", [False, True], ids=["in any order", "in order"])
@pytest.mark.parametrize("is_there", [False, True])
def test_messages_of_another_history_are_held_until_it_is_ours(
    settings: Settings, is_there: bool, ordered: bool
) -> None:
    seen: list[str] = []

    with system_for(settings, [a_route(ordered=ordered)]) as system:
        make_room_for_effects(system.engine)
        client: Any = system.broker.client
        queue = f"{settings.redis.namespace}:test.msgs"
        with system.relay():
            write_quotes(system, [1])
            eventually(lambda: client.hlen(queue), 10, "it to be published")
        with system.engine.begin() as connection:
            this_run, history = connection.execute(
                text("select dovecote.outbox_run(), history from dovecote.relay_state")
            ).one()
            connection.execute(text("update dovecote.relay_state set history = 'the old one'"))
            if not is_there:
                connection.execute(text("delete from dovecote.outbox"))
        ((id, message),) = client.hgetall(queue).items()
        client.hset(queue, id, _of_another_run(system, message, this_run))
        look = system.consumer.history_in_redis

        def looked() -> str | None:
            seen.append(look() or "")
            return seen[-1]

        system.consumer.history_in_redis = looked
        with system.workers():
            eventually(lambda: len(seen) > 3, 10, "the message to be looked at again and again")
            assert client.exists(queue), "it is held"
            assert effects_in(system.engine) == []
            with system.engine.begin() as connection:
                connection.execute(text("update dovecote.relay_state set history = :history"), {"history": history})
            eventually(lambda: not client.exists(queue), 10, "the message to be acknowledged")

        assert set(seen) == {history}
        assert len(effects_in(system.engine)) == is_there


def test_a_failure_is_not_recorded_in_another_history(looking: Looking) -> None:
    there, phantom = looking.bench.write(1, 2)
    looking.forget(phantom)
    looking.execute("update dovecote.relay_state set history = 'the old one'")

    def look() -> str:
        looking.bench.stopping.set()
        return "the new one"

    looking.consumer.history_in_redis = look

    with pytest.raises(Stopping):
        looking.consumer.keep_for_other_code(Bundle(a_route(), [there, phantom]))

    assert looking.bench.deliveries() == []


# Durable commits ----------------------------------------------------------------------------------


def _asks(seen: list[str]) -> Callable[..., None]:
    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        seen.append(uow.session.scalar(text("show synchronous_commit")) or "")
        if event.price == FAILS:
            raise RuntimeError
        note_as("test.note", event, uow)

    return act


FAILS = 13


@pytest.mark.parametrize(
    ("chosen", "expected"), [("off", "on"), ("remote_apply", "remote_apply"), ("local", "local"), ("on", "on")]
)
def test_what_a_message_is_acknowledged_for_is_committed_durably(looking: Looking, chosen: str, expected: str) -> None:
    seen: list[str] = []
    with psycopg.connect(looking.bench.url, autocommit=True) as connection:
        connection.execute(f"alter database {connection.info.dbname} set synchronous_commit = {chosen}")
        connection.execute(
            """
            create table recorded (setting text);
            create function note_setting() returns trigger language plpgsql as
                $$ begin insert into recorded values (current_setting('synchronous_commit')); return null; end $$;
            create trigger note_setting after insert or update on dovecote.deliveries
                for each row execute function note_setting();
            """
        )
    looking.bench.engine.dispose()
    route, written = a_route(function=_asks(seen)), looking.bench.write(1, FAILS)

    looking.consumer.consume(Bundle(route, written[:1]))
    looking.consumer.consume(Bundle(a_route("test.ordered", function=_asks(seen), ordered=True), written[:1]))
    looking.consumer.consume(Bundle(route, written[:1], replay=looking.bench.replay_again()))
    looking.consumer.consume(Bundle(route, written[1:]))
    looking.consumer.consume(Bundle(route, written[1:], retry=True))

    assert seen == [expected] * 5
    with looking.bench.engine.begin() as begun:
        assert begun.scalars(text("select setting from recorded")).all() == [expected] * 2
        begun.execute(text("select dovecote.pause_handler('tester', 'asked', 'test.unknown')"))
        assert begun.scalar(text("show synchronous_commit")) == expected
    with looking.bench.engine.connect() as another:
        assert another.scalar(text("show synchronous_commit")) == chosen, "for its own transactions only"


@pytest.mark.skipif(PGBOUNCER is None, reason="no pgbouncer on this machine")
def test_it_is_committed_durably_through_a_pool_of_transactions(
    fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    seen: list[str] = []
    with psycopg.connect(fresh_database_url, autocommit=True) as connection:
        connection.execute(f"alter database {connection.info.dbname} set synchronous_commit = off")
    with pooled_url(fresh_database_url) as url:
        settings = settings_for(url, servers.redis_url, tmp_path)
        with system_for(settings, [a_route(function=_asks(seen))]) as system:
            make_room_for_effects(system.engine)
            pooled = Looking(Bench(url, system.engine, system.sessions, system.gateways))

            for n in range(4):
                pooled.consumer.consume(Bundle(system.routes[0], pooled.bench.write(n)))

    assert seen == ["on"] * 4
