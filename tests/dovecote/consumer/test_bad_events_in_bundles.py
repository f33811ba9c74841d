"""A few bad events do not make a transaction of each of their mates; what cannot be read enters none at all."""

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.event import listen, remove
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from domain.pricing import PriceQuoted
from dovecote.consumer.parts import Parts
from dovecote.envelope import Envelope
from dovecote.route import Route
from dovecote.store.bundle import Bundle
from dovecote.store.pauses import HandlerPaused
from dovecote.unit_of_work import UnitOfWork
from tests.dovecote.consumer.test_consumer import Bench, bench
from tests.support.effects import a_route, effects_in, note_as

__all__ = ["bench"]


class Bad:
    """Fails for the bad prices, and counts how often it is called for each."""

    def __init__(self, bad: Sequence[int], bulk: bool = False) -> None:
        self.bad, self.bulk = frozenset(bad), bulk
        self.runs: Counter[int] = Counter()

    def __call__(self, given: Any, uow: UnitOfWork, _gateways: object) -> None:
        for event in [envelope.event for envelope in given] if self.bulk else [given]:
            self.runs[int(event.price)] += 1
            note_as("test.note", event, uow)
            if int(event.price) in self.bad:
                raise RuntimeError("bad")

    def route(self, **more: Any) -> Route:
        return a_route(function=self, bulk=self.bulk, **more)


@contextmanager
def transactions() -> Iterator[list[object]]:
    """Count the transactions of all sessions within the block."""
    begun: list[object] = []

    def begin(_session: Session, transaction: Any) -> None:
        if transaction.parent is None:
            begun.append(transaction)

    listen(Session, "after_transaction_create", begin)
    try:
        yield begun
    finally:
        remove(Session, "after_transaction_create", begin)


def bad_ones(how_many: int) -> list[int]:
    return random.Random(11).sample(range(500), how_many)


@pytest.mark.parametrize(
    ("bulk", "how_many", "most"),
    [
        (False, 0, 1),
        (False, 1, 6),
        (True, 1, 2 * math.ceil(math.log2(500))),
        (False, 60, 330),
        (True, 60, 430),
        # All of them: one transaction to find out, and one for its record, as it was.
        (False, 500, 1_010),
        (True, 500, 1_010),
    ],
)
def test_a_bundle_with_bad_events_takes_few_transactions(bench: Bench, bulk: bool, how_many: int, most: int) -> None:
    bad = Bad(bad_ones(how_many), bulk)
    bundle = bench.write(*range(500))

    with transactions() as begun:
        bench.consumer.consume(Bundle(bad.route(), bundle))

    assert sorted(effect.price for effect in effects_in(bench.engine)) == sorted(set(range(500)) - bad.bad)
    assert len(bench.deliveries()) == how_many
    assert len(begun) <= most
    if not bulk:
        assert max(bad.runs.values()) <= 2


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("places", [[0], [4], [9], [0, 9], [3, 4, 5], list(range(10)), [0, 1], [8, 9]])
def test_in_order_every_later_event_of_the_aggregate_waits(bench: Bench, bulk: bool, places: list[int]) -> None:
    bad = Bad(places, bulk)
    written = [envelope for price in range(10) for envelope in bench.write(price, symbol=f"S{price % 2}")]

    bench.consumer.consume(Bundle(bad.route(ordered=True), written))

    first_bad = {n: min((price for price in places if price % 2 == n), default=10) for n in (0, 1)}
    assert sorted(effect.price for effect in effects_in(bench.engine)) == [n for n in range(10) if n < first_bad[n % 2]]
    states = {delivery.position: delivery.state for delivery in bench.deliveries()}
    assert [states[e.position] for e in written if e.position in states] == [
        "retrying" if n in first_bad.values() else "waiting" for n in range(10) if n >= first_bad[n % 2]
    ]


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
def test_a_retry_with_bad_events_resolves_the_others(bench: Bench, bulk: bool) -> None:
    bench.consumer.consume(Bundle(Bad(range(20)).route(), bench.write(*range(20))))
    bad = Bad([3, 17], bulk)

    bench.retry(bad.route())

    assert len(effects_in(bench.engine)) == 18
    assert [(delivery.state, delivery.attempts) for delivery in bench.deliveries()] == [("retrying", 2)] * 2


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
def test_a_replay_with_bad_events_acts_again_on_the_others(bench: Bench, bulk: bool) -> None:
    written = bench.write(*range(20))
    bench.consumer.consume(Bundle(a_route(), written))
    bad = Bad([0, 7, 19], bulk)

    bench.consumer.consume(Bundle(bad.route(), written, replay=bench.replay_again()))

    assert Counter(effect.price for effect in effects_in(bench.engine)) == {
        price: 1 if price in bad.bad else 2 for price in range(20)
    }
    assert [delivery.state for delivery in bench.deliveries()] == ["retrying"] * 3


class Thrice(DeclarativeBase):
    """Where a 3 cannot be written."""


class Number(Thrice):
    __tablename__ = "numbers"
    n: Mapped[int] = mapped_column(primary_key=True)


def test_wrong_blame_costs_no_good_event(bench: Bench) -> None:
    """What the third leaves to be written is flushed in the fourth's call, and blamed on that one."""
    with bench.engine.begin() as connection:
        connection.execute(text("create table numbers (n int primary key check (n <> 3))"))

    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        note_as("test.note", event, uow)  # flushes what the call before has added
        uow.session.add(Number(n=int(event.price)))

    bench.consumer.consume(Bundle(a_route(function=act), bench.write(1, 2, 3, 4, 5, 6)))

    assert [effect.price for effect in effects_in(bench.engine)] == [1, 2, 4, 5, 6]
    assert [delivery.error_type for delivery in bench.deliveries()] == ["IntegrityError"]


def test_what_fails_at_the_commit_is_found_too(bench: Bench) -> None:
    with bench.engine.begin() as connection:
        connection.execute(text("create table unique_later (n int unique deferrable initially deferred)"))
        connection.execute(text("insert into unique_later values (7)"))

    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        note_as("test.note", event, uow)
        uow.session.execute(text("insert into unique_later values (:n)"), {"n": int(event.price)})

    bench.consumer.consume(Bundle(a_route(function=act), bench.write(*range(20))))

    assert [effect.price for effect in effects_in(bench.engine)] == [price for price in range(20) if price != 7]
    assert [delivery.state for delivery in bench.deliveries()] == ["retrying"]


def test_one_event_that_hangs_in_bulk_is_found_in_few_cuts(bench: Bench) -> None:
    cut_off = []

    def act(envelopes: Sequence[Envelope], uow: UnitOfWork, _gateways: object) -> None:
        for envelope in envelopes:
            assert isinstance(envelope.event, PriceQuoted)
            note_as("test.note", envelope.event, uow)
            if envelope.event.price == 77:
                cut_off.append(len(envelopes))
                uow.session.execute(text("select pg_sleep(30)"))

    bench.consumer.consume(Bundle(a_route(function=act, bulk=True, time_limit_seconds=0.5), bench.write(*range(100))))

    assert len(effects_in(bench.engine)) == 99
    assert [delivery.error_type for delivery in bench.deliveries()] == ["TimeLimitExceeded"]
    assert len(cut_off) <= 4


# Parts --------------------------------------------------------------------------------------------


def an_envelope(position: int) -> Envelope:
    return Envelope(UUID(int=position), "t.t.v1", "t", "t", position, "", {})


@given(
    st.integers(1, 80).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)), st.sampled_from(["right", "none", "wrong"]))
    )
)
def test_each_event_is_done_or_recorded_alone_once_and_in_order(case: tuple[int, set[int], str]) -> None:
    how_many, bad, blame = case
    parts = Parts([an_envelope(n) for n in range(how_many)])
    done: list[int] = []
    recorded: list[int] = []
    tried = 0

    while part := parts.next():
        tried += 1
        assert tried <= 3 * how_many + 10
        positions = [envelope.position for envelope in part]
        assert positions[0] == len(done) + len(recorded), "left to right"
        first_bad = next((envelope for envelope in part if envelope.position in bad), None)
        if first_bad is None:
            done += positions
            parts.succeeded()
        elif len(part) == 1:
            recorded += positions
            parts.was_bad()
        else:
            parts.failed({"right": first_bad, "none": None, "wrong": part[-1]}[blame])

    assert recorded == sorted(bad)
    assert done == sorted(set(range(how_many)) - bad)


# What cannot be read ------------------------------------------------------------------------------


def spoilt(envelope: Envelope) -> Envelope:
    return replace(envelope, data={"symbol": "EUR"})


def unreadable(envelope: Envelope) -> Envelope:
    return replace(envelope, data=None, unreadable="a number too large")  # type: ignore[arg-type]  # as it is read


def of_newer_code(envelope: Envelope) -> Envelope:
    return replace(envelope, type="pricing.price_quoted.v99")


@pytest.mark.parametrize("bulk", [False, True], ids=["single", "bulk"])
@pytest.mark.parametrize("ordered", [False, True], ids=["in any order", "in order"])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoilt, ("dead", 1, "InvalidEvent")),
        (unreadable, ("dead", 1, "InvalidEvent")),
        (of_newer_code, ("retrying", 0, "UnknownEvent")),
    ],
)
def test_what_cannot_be_read_enters_no_transaction_of_the_handler(
    bench: Bench, spoil: Any, expected: tuple[str, int, str], bulk: bool, ordered: bool
) -> None:
    good = Bad([], bulk)
    written = [envelope for n in range(20) for envelope in bench.write(n, symbol=f"S{n}")]
    bundle = [spoil(envelope) if n % 4 == 1 else envelope for n, envelope in enumerate(written)]
    bench.rename([envelope for n, envelope in enumerate(bundle) if n % 4 == 1])

    with transactions() as begun:
        bench.consumer.consume(Bundle(good.route(ordered=ordered), bundle))

    assert len(begun) == 2, "one for their record, one for the others"
    assert [effect.price for effect in effects_in(bench.engine)] == [n for n in range(20) if n % 4 != 1]
    assert [(d.state, d.attempts, d.error_type) for d in bench.deliveries()] == [expected] * 5
    bench.consumer.consume(Bundle(good.route(ordered=ordered), bundle))
    assert [(d.state, d.attempts, d.error_type) for d in bench.deliveries()] == [expected] * 5, "recorded once"


def test_a_retry_that_cannot_be_read_spends_an_attempt_each_time(bench: Bench) -> None:
    written = bench.write(1, 2, 3)
    bench.consumer.consume(Bundle(Bad([1, 2, 3]).route(), written))
    bundle = [spoilt(written[0]), spoilt(written[1]), written[2]]

    bench.consumer.consume(Bundle(a_route(), bundle, retry=True))
    bench.consumer.consume(Bundle(a_route(), bundle, retry=True))

    assert [(d.state, d.attempts, d.error_type) for d in bench.deliveries()] == [("dead", 2, "InvalidEvent")] * 2
    assert [effect.price for effect in effects_in(bench.engine)] == [3]


def test_what_is_done_is_not_recorded_when_it_comes_again_and_cannot_be_read(bench: Bench) -> None:
    written = bench.write(1, 2, 3)
    bench.consumer.consume(Bundle(a_route(), written))

    bench.consumer.consume(Bundle(a_route(), [spoilt(envelope) for envelope in written]))

    assert bench.deliveries() == []


def test_in_a_replay_what_cannot_be_read_fails_for_that_replay_and_is_not_marked(bench: Bench) -> None:
    written = bench.write(1, 2, 3)
    bench.consumer.consume(Bundle(a_route(), written))
    replay = bench.replay_again()

    bench.consumer.consume(Bundle(a_route(), [written[0], spoilt(written[1]), written[2]], replay=replay))

    assert sorted(effect.price for effect in effects_in(bench.engine)) == [1, 1, 2, 3, 3]
    assert [(d.state, d.error_type) for d in bench.deliveries()] == [("dead", "InvalidEvent")]
    with bench.engine.connect() as connection:
        query = text("select count(*) from dovecote.processed_events where replay_id = :replay")
        assert connection.scalar(query, {"replay": replay}) == 2


def test_a_paused_handler_s_unreadable_events_are_held_with_the_others(bench: Bench) -> None:
    written = bench.write(1, 2)
    with bench.engine.begin() as connection:
        connection.execute(
            text("insert into dovecote.paused_handlers (handler_name, actor, reason) values ('test.note', 't', 't')")
        )

    with pytest.raises(HandlerPaused):
        bench.consumer.consume(Bundle(a_route(), [spoilt(written[0]), written[1]]))

    assert bench.deliveries() == []


def test_a_burst_of_unreadable_events_takes_seconds(bench: Bench) -> None:
    bundles = [[spoilt(envelope) for envelope in bench.write(*range(500))] for _ in range(10)]
    began = time.monotonic()

    with transactions() as begun:
        for bundle in bundles:
            bench.consumer.consume(Bundle(a_route(), bundle))

    assert len(begun) == len(bundles)
    assert len(bench.deliveries()) == 5_000
    assert time.monotonic() - began < 60
