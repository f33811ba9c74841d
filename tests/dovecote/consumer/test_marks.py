"""What marks protect: a message that comes twice, one that overlaps another, a retry, a discard, a replay."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.event import listen
from sqlalchemy.orm import Session

from domain.pricing import PriceQuoted
from dovecote import processed_events
from dovecote.envelope import Envelope
from dovecote.settings import Settings
from dovecote.store.bundle import Bundle
from dovecote.store.connections import connect, sessions_for
from dovecote.store.deliveries import Deliveries
from dovecote.unit_of_work import UnitOfWork
from tests.dovecote.consumer.test_consumer import Bench, Failing
from tests.support.effects import a_route, make_room_for_effects, note_as
from tests.support.processes import eventually
from workers.gateways import gateways_for

pytestmark = pytest.mark.servers

HANDLER = "test.note"


@pytest.fixture
def bench(fresh_database_url: str, settings: Settings) -> Iterator[Bench]:
    engine = connect(fresh_database_url)
    make_room_for_effects(engine)
    yield Bench(fresh_database_url, engine, sessions_for(engine), gateways_for(settings))
    engine.dispose()


# Without an order a bundle is marked in one statement, in order in two.
either_way = pytest.mark.parametrize("ordered", [False, True], ids=["in any order", "in order"])


@either_way
def test_a_message_that_comes_twice_is_acted_on_once_and_fails_for_nobody(bench: Bench, ordered: bool) -> None:
    route = a_route(ordered=ordered)
    bundle = bench.write(1, 2)

    bench.consumer.consume(Bundle(route, bundle))
    bench.consumer.consume(Bundle(route, bundle))

    assert bench.effects() == [("EUR", 1), ("EUR", 2)]
    assert bench.deliveries() == []


@either_way
def test_what_failed_keeps_its_schedule_when_its_bundle_comes_again(bench: Bench, ordered: bool) -> None:
    failing = Failing({1: 1})
    route = a_route(function=failing, ordered=ordered)
    bundle = bench.write(1)

    bench.consumer.consume(Bundle(route, bundle))
    bench.consumer.consume(Bundle(route, bundle))

    assert failing.calls == [1]
    assert bench.states() == [("EUR", "retrying")]


def mark(session: Session, envelopes: Sequence[Envelope]) -> object:
    return processed_events.mark(session, HANDLER, [envelope.event_id for envelope in envelopes])


def mark_unless_failed(session: Session, envelopes: Sequence[Envelope]) -> object:
    return Deliveries(session, a_route()).once_unless_failed(Bundle(a_route(), envelopes))


@pytest.mark.parametrize("marks", [mark, mark_unless_failed])
def test_bundles_that_overlap_wait_for_each_other_before_they_mark_anything_else(
    bench: Bench, marks: Callable[[Session, Sequence[Envelope]], object]
) -> None:
    first, *others = sorted(bench.write(*range(200)), key=lambda envelope: envelope.event_id)
    waits_for_first: list[int] = []

    def overlapping() -> None:
        with bench.sessions() as session:
            waits_for_first.append(session.scalar(text("select pg_backend_pid()")) or 0)
            marks(session, [*reversed(others), first])

    worker = threading.Thread(target=overlapping)
    with bench.sessions() as one, bench.sessions() as another:
        marks(one, [first])
        worker.start()
        blocked = text("select cardinality(pg_blocking_pids(:pid)) > 0")
        eventually(
            lambda: waits_for_first and another.scalar(blocked, {"pid": waits_for_first[0]}), 10, "a bundle that waits"
        )

        another.execute(text("set local lock_timeout = '2s'"))
        marks(another, others)  # raises where the bundle has marked one of them: each would wait for the other
        assert another.scalar(text("select count(*) from dovecote.processed_events")) == len(others)
    worker.join()


def test_what_is_being_tried_again_cannot_be_discarded_until_that_ends(bench: Bench) -> None:
    can_be_discarded: list[list[Any]] = []

    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        note_as(HANDLER, event, uow)
        with bench.engine.begin() as operator:
            free = operator.scalars(text("select event_id from dovecote.deliveries for update skip locked"))
            can_be_discarded.append(list(free))
        if len(can_be_discarded) == 1:
            raise RuntimeError

    route = a_route(function=act)
    bench.consumer.consume(Bundle(route, bench.write(1)))
    assert bench.states() == [("EUR", "retrying")]

    bench.retry(route)

    assert can_be_discarded == [[], []]
    assert bench.effects() == [("EUR", 1)]
    assert bench.deliveries() == []


def test_what_was_discarded_before_its_failure_could_be_recorded_stays_discarded(bench: Bench) -> None:
    failing = Failing({1: 2})

    def discarded_after_its_second_failure(event: PriceQuoted, uow: UnitOfWork, gateways: object) -> None:
        if failing.calls:
            listen(uow.session, "after_rollback", lambda _: bench.discard(1), once=True)
        failing(event, uow, gateways)

    route = a_route(function=discarded_after_its_second_failure)
    bench.consumer.consume(Bundle(route, bench.write(1)))

    bench.retry(route)

    assert failing.calls == [1, 1]
    assert bench.states() == [("EUR", "discarded")]
    assert bench.retry(route) == 0


# Replays ------------------------------------------------------------------------------------------


def test_a_message_of_a_replay_that_comes_twice_is_acted_on_once(bench: Bench) -> None:
    bundle = bench.write(1, 2)
    bench.consumer.consume(Bundle(a_route(), bundle))
    replay = bench.replay_again()

    bench.consumer.consume(Bundle(a_route(), bundle, replay=replay))
    bench.consumer.consume(Bundle(a_route(), bundle, replay=replay))

    assert bench.effects() == [("EUR", 1), ("EUR", 2)] * 2


@pytest.mark.parametrize("retry", [False, True])
def test_a_message_of_a_cancelled_replay_is_not_acted_on(bench: Bench, retry: bool) -> None:
    failing = Failing({1: 1})
    bundle = bench.write(1)
    bench.consumer.consume(Bundle(a_route(), bundle))
    replay = bench.replay_again()
    if retry:
        bench.consumer.consume(Bundle(a_route(function=failing), bundle, replay=replay))
        assert bench.states() == [("EUR", "retrying")]
    with bench.engine.begin() as operator:
        operator.execute(text("update dovecote.replays set state = 'cancelled', finished_at = now()"))

    bench.consumer.consume(Bundle(a_route(), bundle, replay=replay, retry=retry))

    assert bench.effects() == [("EUR", 1)]


def test_what_follows_an_event_that_failed_in_a_replay_waits_for_it(bench: Bench) -> None:
    first, *others = bundle = bench.write(1, 2, 3)
    bench.consumer.consume(Bundle(a_route(ordered=True), bundle))
    replay = bench.replay_again()
    failing = a_route(function=Failing({1: 1}), ordered=True)

    bench.consumer.consume(Bundle(failing, [first], replay=replay))
    bench.consumer.consume(Bundle(failing, others, replay=replay))

    assert bench.states() == [("EUR", "retrying"), ("EUR", "waiting"), ("EUR", "waiting")]
    assert bench.effects() == [("EUR", 1), ("EUR", 2), ("EUR", 3)]
