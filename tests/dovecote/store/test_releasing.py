"""What waits behind a failure goes on once that is done: in order, once, a bundle at a time, one update an event."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.event import listen
from sqlalchemy.orm import Session

from domain.pricing import PriceQuoted
from dovecote import operations
from dovecote.envelope import Envelope, read_envelope
from dovecote.errors import Refused
from dovecote.operations.deliveries import DeliverySelection
from dovecote.operations.handlers import pause, resume
from dovecote.relay.bundler import Bundler
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.store import leases
from dovecote.store.bundle import Bundle
from dovecote.store.leases import MAX_BUNDLE_BYTES, Cursor, DueDelivery
from dovecote.telemetry.instrumentation import RelayInstrumentation
from dovecote.unit_of_work import UnitOfWork
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

HANDLER = "test.note"


@dataclass
class Counts(RelayInstrumentation):
    """What the relay did."""

    messages: int = 0
    deliveries: int = 0

    def sent(self, messages: int) -> None:
        self.messages += messages

    def retried(self, events: int) -> None:
        self.deliveries += events


@dataclass
class Mood:
    """Prices that fail, each with its error, until they are taken out."""

    broken: dict[int, Exception] = field(default_factory=dict)
    once: dict[int, Exception] = field(default_factory=dict)

    def __call__(self, event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        price = int(event.price)
        note_as(HANDLER, event, uow)
        error = self.broken.get(price) or self.once.pop(price, None)
        if error is not None:
            raise error


Make = Callable[..., System]


@pytest.fixture
def mood() -> Mood:
    return Mood()


@pytest.fixture
def ordered(settings: Settings, mood: Mood) -> Iterator[Make]:
    """Make systems whose ordered handler is in that mood; words are of its route."""
    opened: list[Any] = []

    def make(**words: Any) -> System:
        route = a_route(HANDLER, function=mood, ordered=True, **{"replayable": True, **words})
        context = system_for(settings, [route])
        opened.append(context)
        system: System = context.__enter__()
        make_room_for_effects(system.engine)
        return system

    yield make
    for context in opened:
        context.__exit__(None, None, None)


def updates_of_deliveries(system: System) -> int:
    """Row versions that were made by updates; Postgres counts them when the sessions report."""
    with system.engine.connect() as connection:
        return int(
            connection.scalar(
                text("select n_tup_upd from pg_stat_user_tables where relid = 'dovecote.deliveries'::regclass")
            )
        )


def end_sessions(system: System) -> None:
    """A session reports its statistics at its next pause, and at its end in any case."""
    system.engine.dispose()


def states(system: System) -> dict[str, int]:
    with system.engine.connect() as connection:
        found = connection.execute(text("select state, count(*) from dovecote.deliveries group by 1"))
        return {row[0]: row[1] for row in found}


def prices(system: System) -> list[int]:
    return [effect.price for effect in effects_in(system.engine)]


def block(system: System, mood: Mood, events: int) -> None:
    """Have event 0 dead and all others wait behind it."""
    mood.broken[0] = Refused("not yet")
    with system.running():
        for first in range(0, events, 500):
            write_quotes(system, range(first, min(events, first + 500)))
        eventually(lambda: states(system) == {"dead": 1, "waiting": events - 1}, 60, f"blocked: {states(system)}")
    mood.broken.clear()
    end_sessions(system)


def unblock(system: System) -> None:
    operations.deliveries.retry(system.engine, DeliverySelection(handler=HANDLER), actor="ada", routes=system.routes)


# What it costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "bundle_size", "workers"), [(1_201, 500, 1), (1_201, 100, 2), (61, 2, 2), (31, 1, 2)]
)
def test_a_released_event_is_written_once_and_sent_in_full_bundles(
    ordered: Make, mood: Mood, events: int, bundle_size: int, workers: int
) -> None:
    system, counts = ordered(bundle_size=bundle_size), Counts()
    block(system, mood, events)
    before = updates_of_deliveries(system)

    with system.relay(counts), system.workers(workers):
        unblock(system)
        eventually(lambda: len(prices(system)) == events, 60, f"all acted on: {states(system)}")
        eventually(lambda: not states(system), 10, "no delivery")
    end_sessions(system)

    assert prices(system) == list(range(events))
    bundles = -(-(events - 1) // bundle_size)
    # The dead one: asked for, leased. Each other: leased. The first of each bundle: released as well.
    least = 2 + (events - 1) + bundles
    eventually(lambda: updates_of_deliveries(system) - before >= least, 10, "the statistics")
    assert updates_of_deliveries(system) - before == least
    assert counts.messages == 1 + bundles
    assert counts.deliveries == events


def test_discarding_releases_the_first_and_counts_all(ordered: Make, mood: Mood) -> None:
    system = ordered(bundle_size=4)
    block(system, mood, 10)

    change = operations.deliveries.discard(
        system.engine, DeliverySelection(handler=HANDLER), actor="ada", reason="given up"
    )
    assert change.released == 9
    assert states(system) == {"discarded": 1, "retrying": 1, "waiting": 8}
    with system.running():
        system.until_quiet()

    assert prices(system) == list(range(1, 10))


def test_a_bundle_of_released_events_is_bounded_in_bytes(ordered: Make, mood: Mood) -> None:
    system = ordered(bundle_size=500)
    block(system, mood, 12)
    with system.engine.begin() as connection:
        connection.execute(
            text("update dovecote.outbox set payload = payload || jsonb_build_object('note', repeat('x', 300000))")
        )
    with system.engine.begin() as connection:
        connection.execute(text("delete from dovecote.deliveries where state = 'dead'"))
        connection.execute(
            text(
                "insert into dovecote.processed_events (event_id, handler_name) select id, :h from dovecote.outbox"
                " order by position limit 1"
            ),
            {"h": HANDLER},
        )

    due = leased(system)
    messages = list(Bundler(system.routes).retries(due))

    assert [one.position for one in due] == sorted(one.position for one in due)
    assert len(due) == 3
    assert len(messages) == 1
    assert len(messages[0].message) < MAX_BUNDLE_BYTES + 2_000


def leased(system: System, lease_seconds: float = 60) -> list[DueDelivery]:
    """Play the relay: look for what nothing blocks, and lease it."""
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        leases.release_unblocked(connection, system.routes[0])
        return leases.lease_due(connection, 1_000, lease_seconds, system.routes)


# What goes wrong in between -----------------------------------------------------------------------


@pytest.mark.parametrize("bundle_size", [3, 500])
def test_a_failure_in_the_middle_of_what_was_released_keeps_the_order(
    ordered: Make, mood: Mood, bundle_size: int
) -> None:
    system = ordered(bundle_size=bundle_size, max_attempts=10)
    block(system, mood, 20)
    mood.once.update({7: RuntimeError("once"), 8: RuntimeError("once")})

    with system.running():
        unblock(system)
        system.until_quiet()

    assert prices(system) == list(range(20))
    assert states(system) == {}


def test_one_that_fails_again_and_again_takes_nothing_along(ordered: Make, mood: Mood) -> None:
    system = ordered(bundle_size=10, max_attempts=6)
    block(system, mood, 11)
    mood.broken[0] = RuntimeError("still")
    before = updates_of_deliveries(system)

    with system.running():
        unblock(system)
        eventually(lambda: states(system) == {"retrying": 1, "waiting": 10}, 10, "tried again")
        eventually(lambda: states(system) == {"dead": 1, "waiting": 10}, 20, "given up")
    end_sessions(system)

    # Of itself: asked for, and leased and recorded for each attempt.
    eventually(lambda: updates_of_deliveries(system) - before >= 13, 10, "the statistics")
    assert updates_of_deliveries(system) - before == 13


def test_a_message_that_was_leased_and_never_sent_goes_out_again_as_it_was(ordered: Make, mood: Mood) -> None:
    """The relay dies between leasing and sending; the next one ends its leases."""
    system = ordered(bundle_size=4)
    block(system, mood, 11)
    with system.relay(), system.workers():
        pass
    operations.deliveries.discard(system.engine, DeliverySelection(handler=HANDLER), actor="ada", reason="given up")
    lost = leased(system)
    assert len(lost) == 4
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        assert leases.end_leases(connection) == 4

    again = leased(system)
    assert [message.id for message in Bundler(system.routes).retries(again)] == [
        message.id for message in Bundler(system.routes).retries(lost)
    ]
    with system.running():
        system.until_quiet()

    assert prices(system) == list(range(1, 11))


def test_a_redis_that_is_wiped_between_bundles_loses_nothing(ordered: Make, mood: Mood) -> None:
    system = ordered(bundle_size=5)
    block(system, mood, 43)
    with system.relay():
        unblock(system)
        with system.workers(1):
            eventually(lambda: len(prices(system)) >= 10, 20, "some acted on")
        for key in system.broker.client.scan_iter(f"{system.settings.redis.namespace}:*"):
            system.broker.client.delete(key)
        with system.workers(2):
            system.until_quiet()

    assert prices(system) == list(range(43))


def test_a_handler_paused_in_the_middle_goes_on_where_it_was(ordered: Make, mood: Mood) -> None:
    system = ordered(bundle_size=5)
    block(system, mood, 43)
    with system.running():
        unblock(system)
        eventually(lambda: len(prices(system)) >= 5, 20, "some acted on")
        pause(system.engine, system.routes, HANDLER, actor="ada", reason="a look")
        resume(system.engine, system.routes, HANDLER, actor="ada")
        system.until_quiet()

    assert prices(system) == list(range(43))


def test_an_event_parked_during_the_commit_of_the_one_before_it_goes_on_at_once(ordered: Make, mood: Mood) -> None:
    system = ordered()
    committing, go_on = threading.Event(), threading.Event()

    def commit_slowly(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        note_as(HANDLER, event, uow)

        def wait(_session: Session) -> None:
            committing.set()
            assert go_on.wait(10)

        if event.price == 0:
            listen(uow.session, "before_commit", wait)

    route: Route = a_route(HANDLER, function=commit_slowly, ordered=True)
    write_quotes(system, [0, 1])
    first, second = envelopes(system)
    worker = threading.Thread(target=system.consumer.consume, args=(Bundle(route, [first]),))
    worker.start()
    assert committing.wait(10)
    parker = threading.Thread(target=system.consumer.consume, args=(Bundle(route, [second]),))
    parker.start()
    looks_again = "select 1 from pg_stat_activity where pid <> pg_backend_pid() and query like '%release_parked%'"
    eventually(lambda: found(system, looks_again) or not parker.is_alive(), 10, "the second parked and looked at again")
    assert states(system) == {"waiting": 1}

    go_on.set()
    worker.join()
    parker.join()

    assert states(system) == {"retrying": 1}


def found(system: System, query: str) -> bool:
    with system.engine.connect() as connection:
        return connection.execute(text(query)).first() is not None


def envelopes(system: System) -> list[Envelope]:
    with system.engine.connect() as connection:
        found = connection.scalars(text("select dovecote.envelope(o) from dovecote.outbox o order by position"))
        return [read_envelope(orjson.loads(one)) for one in found]


def test_an_event_whose_predecessor_is_under_way_is_not_released(ordered: Make, mood: Mood) -> None:
    system = ordered()
    write_quotes(system, [0, 1, 2])
    first, _, third = envelopes(system)
    with system.engine.begin() as connection:
        connection.execute(
            text(
                "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
                " event_type, state) values (:h, :id, :p, :t, :a, :e, 'waiting')"
            ),
            {
                "h": HANDLER,
                "id": third.event_id,
                "p": third.position,
                "t": third.aggregate_type,
                "a": third.aggregate_id,
                "e": third.type,
            },
        )

    system.consumer.consume(Bundle(system.routes[0], [first]))

    assert states(system) == {"waiting": 1}


# What the relay looks at --------------------------------------------------------------------------


def test_the_relay_finds_what_nothing_blocks_among_many_that_are_blocked(ordered: Make) -> None:
    system = ordered()
    url = system.settings.database.url.get_secret_value()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)"
            " select 'price', 'A' || g % 120, 'pricing.price_quoted.v1', '{}' from generate_series(0, 359) g"
        )
        connection.execute(
            "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
            " event_type, state) select 'test.note', id, position, aggregate_type, aggregate_id, event_type, 'waiting'"
            " from (select *, row_number() over (partition by aggregate_id order by position) n from dovecote.outbox) o"
            " where n > 1 or aggregate_id in ('A7', 'A119')"
        )
        cursor = Cursor()
        looks = [
            leases.release_unblocked(connection, system.routes[0], cursor)
            for _ in range(120 // leases._AGGREGATES_A_LOOK + 1)
        ]
        found = connection.execute("select aggregate_id from dovecote.deliveries where state = 'retrying'").fetchall()

    assert sum(looks) == 2
    assert sorted(found) == [("A119",), ("A7",)]
    assert cursor == Cursor(), "back at the beginning"
