"""Whatever is delivered, again, at once, too early or too late: each event takes effect once, ordered ones in order.

Hypothesis plays the relay, the operators and the outside world; a few lines of Python say what must have come of it.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import orjson
import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from domain.pricing import PriceQuoted
from dovecote.consumer.consumer import Consumer
from dovecote.envelope import Envelope, read_envelope
from dovecote.errors import GatewayUnavailable, Refused
from dovecote.settings import Settings
from dovecote.store import leases
from dovecote.store.bundle import Bundle
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.effects import a_route, make_room_for_effects, note_as
from tests.support.profiles import examples
from tests.support.quotes import a_quote
from workers.gateways import gateways_for

WELL, FAILS, AWAY, REFUSED = "well", "fails", "away", "refused"
EFFECT, DEAD, DISCARDED, WAITING = "effect", "dead", "discarded", "waiting"


@dataclass
class Written:
    """One event and what its handler will meet: `times` failures before it goes well."""

    envelope: Envelope
    aggregate: int
    kind: str
    times: int
    delivered: bool = False
    discarded: bool = False


class Consuming(RuleBasedStateMachine):
    """Events of three aggregates, one handler, and everything that may happen to a message."""

    url: str
    sessions: sessionmaker[Session]
    consumer: Consumer
    ordered: bool

    @initialize()
    def start(self) -> None:
        # A handler and aggregates of its own: what earlier runs left behind is none of its business.
        self.name = f"test.{uuid4().hex}"
        self.route = a_route(self.name, function=self.act, ordered=self.ordered, max_attempts=1_000, bundle_size=3)
        self.events: list[Written] = []
        self.lock = threading.Lock()
        self.troubles: list[BaseException] = []
        self.relay = psycopg.connect(self.url, autocommit=True)

    def act(self, event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        one = self.events[int(event.price)]
        note_as(self.name, event, uow)
        if one.kind == REFUSED:
            raise Refused("not this one")
        with self.lock:
            one.times, left = max(0, one.times - 1), one.times
        if left:
            raise GatewayUnavailable("nobody there") if one.kind == AWAY else RuntimeError("it failed")

    # What happens --------------------------------------------------------------------------------

    @rule(
        aggregate=st.integers(0, 2),
        fates=st.lists(st.tuples(st.sampled_from([WELL, WELL, FAILS, AWAY, REFUSED]), st.integers(1, 3)), max_size=3),
    )
    def write(self, aggregate: int, fates: list[tuple[str, int]]) -> None:
        first = len(self.events)
        quotes = [a_quote(f"{self.name}.{aggregate}", first + n) for n in range(len(fates))]
        with unit_of_work(self.sessions) as uow:
            for quote in quotes:
                uow.emit(quote)
        found = self.relay.execute(
            "select dovecote.envelope(o) from dovecote.outbox o where id = any(%s) order by position",
            ([quote.event_id for quote in quotes],),
        )
        for (envelope,), (kind, times) in zip(found.fetchall(), fates, strict=True):
            times = times if kind in (FAILS, AWAY) else 0
            self.events.append(Written(read_envelope(orjson.loads(envelope)), aggregate, kind, times))

    @precondition(lambda self: self.events)
    @rule(data=st.data(), workers=st.integers(1, 3))
    def deliver(self, data: st.DataObject, workers: int) -> None:
        """Bundles of any events, new or known, to several workers at once."""
        some = st.lists(st.integers(0, len(self.events) - 1), min_size=1, max_size=4, unique=True).map(sorted)
        bundles = [data.draw(some) for _ in range(workers)]
        for number in {number for bundle in bundles for number in bundle}:
            self.events[number].delivered = True
        self.at_once([([self.events[number].envelope for number in bundle], False) for bundle in bundles])

    @rule(parts=st.integers(1, 3), twice=st.booleans(), lost=st.booleans())
    def send_retries(self, parts: int, twice: bool, lost: bool) -> None:
        """Every retry is due; its message goes to several workers, arrives twice, or gets lost."""
        due = self.due()
        bundles = [due[start::parts] for start in range(parts)]
        if not lost:
            self.at_once([(bundle, True) for bundle in bundles * (2 if twice else 1) if bundle])

    @rule()
    def release_unblocked(self) -> None:
        leases.release_unblocked(self.relay, self.route)

    @precondition(lambda self: self.events)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        """An operator gives one up that did not go well."""
        one = self.events[data.draw(st.integers(0, len(self.events) - 1))]
        changed = self.relay.execute(
            "update dovecote.deliveries set state = 'discarded', next_attempt_at = null"
            " where handler_name = %s and event_id = %s and not exists (select from dovecote.processed_events p"
            " where p.handler_name = %s and p.event_id = %s)",
            (self.name, one.envelope.event_id, self.name, one.envelope.event_id),
        ).rowcount
        one.discarded = one.discarded or changed == 1

    @rule()
    def retry_the_dead(self) -> None:
        self.relay.execute(
            "update dovecote.deliveries set state = 'retrying', next_attempt_at = now()"
            " where handler_name = %s and state = 'dead'",
            (self.name,),
        )

    # What must hold ------------------------------------------------------------------------------

    def check(self) -> None:
        assert self.troubles == []
        effects, states = self.effects(), self.states()
        assert len(effects) == len(set(effects)), "an event took effect twice"
        assert set(effects) == self.processed(), "marked and acted on differ"
        for number, one in enumerate(self.events):
            assert not one.delivered or number in effects or number in states, f"event {number} is lost"
            assert not (one.discarded and number in effects), f"event {number} was given up and took effect"
        if self.ordered:
            done: set[int] = set()
            for number in effects:
                before = [n for n in range(number) if self.events[n].aggregate == self.events[number].aggregate]
                open_ = [n for n in before if n not in done and not self.events[n].discarded]
                assert open_ == [], f"event {number} took effect before {open_}"
                done.add(number)

    def teardown(self) -> None:
        if not hasattr(self, "relay"):
            return
        self.at_once([([one.envelope for one in self.events], False)])
        for one in self.events:
            one.delivered = True
        for _ in range(10 * len(self.events) + 10):
            self.release_unblocked()
            if not (due := self.due()):
                break
            self.at_once([(due, True)])
        states = self.states()
        expected = self.expected()
        self.relay.execute("delete from dovecote.deliveries where handler_name = %s", (self.name,))
        self.relay.close()
        effects = set(expected) - set(states)
        assert {**dict.fromkeys(effects, EFFECT), **states} == expected

    def expected(self) -> dict[int, str]:
        """Say what becomes of each event at last."""
        fate: dict[int, str] = {}
        stuck: set[int] = set()
        for number, one in enumerate(self.events):
            if one.discarded:
                fate[number] = DISCARDED
            elif self.ordered and one.aggregate in stuck:
                fate[number] = WAITING
            elif one.kind == REFUSED:
                fate[number] = DEAD
                stuck.add(one.aggregate)
            else:
                fate[number] = EFFECT
        return fate

    # Hands and eyes ------------------------------------------------------------------------------

    def at_once(self, work: Sequence[tuple[list[Envelope], bool]]) -> None:
        def consume(envelopes: list[Envelope], retry: bool) -> None:
            try:
                self.consumer.consume(Bundle(self.route, envelopes, retry=retry))
            except BaseException as error:
                self.troubles.append(error)

        if len(work) == 1:
            consume(*work[0])
        else:
            threads = [threading.Thread(target=consume, args=one) for one in work]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.check()

    def due(self) -> list[Envelope]:
        self.relay.execute(
            "update dovecote.deliveries set next_attempt_at = now() where state = 'retrying' and handler_name = %s",
            (self.name,),
        )
        leased = leases.lease_due(self.relay, 1_000, 60, [self.route])
        return [read_envelope(orjson.loads(one.envelope)) for one in leased if one.handler_name == self.name]

    def numbers(self, query: str) -> list[tuple[Any, ...]]:
        by_id: dict[UUID, int] = {one.envelope.event_id: number for number, one in enumerate(self.events)}
        found = self.relay.execute(query, (self.name,)).fetchall()
        return [(by_id[event_id], *more) for event_id, *more in found]

    def effects(self) -> list[int]:
        return [number for (number,) in self.numbers("select event_id from effects where handler = %s order by n")]

    def processed(self) -> set[int]:
        query = "select event_id from dovecote.processed_events where handler_name = %s"
        return {number for (number,) in self.numbers(query)}

    def states(self) -> dict[int, str]:
        return dict(self.numbers("select event_id, state from dovecote.deliveries where handler_name = %s"))


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_whatever_is_delivered_in_whatever_order_takes_effect_once(
    engine: Engine, database_url: str, sessions: sessionmaker[Session], settings_: Settings, ordered: bool
) -> None:
    class Machine(Consuming):
        pass

    Machine.url, Machine.sessions, Machine.ordered = database_url, sessions, ordered
    Machine.consumer = Consumer(
        sessions, gateways_for(settings_), outage_max_backoff_seconds=0.05, keyring=settings_.keyring_if_given()
    )
    run_state_machine_as_test(Machine, settings=settings(max_examples=examples(25, 400), stateful_step_count=20))


@pytest.fixture
def settings_(settings: Settings) -> Settings:
    return settings


@pytest.fixture(scope="module", autouse=True)
def room(engine: Engine) -> None:
    make_room_for_effects(engine)
    with engine.begin() as connection:
        connection.execute(text("create index on effects (handler, n)"))
