"""Hypothesis against replays: real Postgres and Redis, the real relay's loop and the real consumer, one step at a time.

Messages are taken in any order, twice, and again after they were acknowledged; handlers fail; relays die and wake up;
Redis is wiped; replays are paused, resumed, cancelled. Then the handler's effects are looked at: each live event once,
each event of a replay once for that replay, and in order where order is promised.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import orjson
import psycopg
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text

from domain.pricing import PriceQuoted
from dovecote.envelope import read_envelope
from dovecote.operations import replays
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.history import History
from dovecote.relay.leader import Leader
from dovecote.settings import Settings
from dovecote.store import leases
from dovecote.store.bundle import Bundle
from dovecote.store.reader import Reader
from dovecote.store.relay_state import take_over
from dovecote.store.replays import ReplaySelection
from dovecote.unit_of_work import UnitOfWork
from tests.support.effects import a_route, write_quotes
from tests.support.profiles import examples
from tests.support.system import System, system_for
from workers.gateways import Gateways

pytestmark = pytest.mark.timeout(300)

SYMBOLS = ("EUR", "USD", "CHF")
HANDLER = "test.machine"
WIPE = "for _, key in ipairs(redis.call('keys', ARGV[1])) do redis.call('del', key) end"


class OnePass(StopFlag):
    """Lets the relay's loop run once, without a pause."""

    def __init__(self) -> None:
        self.passes = 0

    def is_set(self) -> bool:  # the loop asks it before each pass
        self.passes += 1
        return self.passes > 1

    def sleep(self, seconds: float, watched: Any = None) -> bool:
        return True


@dataclass
class Message:
    """A message that was fetched once; it may be delivered again at any time."""

    id: str
    envelopes: list[dict[str, Any]]
    retry: bool
    replay: UUID | None


@dataclass
class Stage:
    """What outlives an example: the servers and the connections."""

    system: System
    url: str
    failing: set[tuple[str, int]] = field(default_factory=set)


def machine_on(stage: Stage) -> type[RuleBasedStateMachine]:
    """Return the machine's class; hypothesis makes one instance for each example."""
    system, route = stage.system, stage.system.routes[0]

    class Replaying(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            stage.failing.clear()
            self.prices: Counter[str] = Counter()
            self.seen: list[Message] = []
            self.asked: dict[UUID, set[UUID]] = {}
            self.cancelled: dict[UUID, int] = {}
            self.clean()
            self.take_over()

        def clean(self) -> None:
            system.broker.client.eval(WIPE, 0, f"{system.settings.redis.namespace}:*")
            self.run(
                "truncate dovecote.outbox, dovecote.processed_events, dovecote.deliveries, dovecote.published_batches,"
                " dovecote.replays, dovecote.audit_log, dovecote.subscriptions, replay_effects"
            )
            self.run(
                "update dovecote.relay_state set redis_run_id = null, epoch = epoch + 1,"
                " checkpoint = coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0)"
            )
            self.run(
                "insert into dovecote.subscriptions select :handler, type, checkpoint"
                " from dovecote.relay_state, unnest(cast(:types as text[])) as type",
                handler=HANDLER,
                types=route.event_types,
            )

        def teardown(self) -> None:
            self.connection.close()

        def run(self, query: str, **fields: Any) -> Any:
            with system.engine.begin() as connection:
                done = connection.execute(text(query), fields)
                return done.fetchall() if done.returns_rows else []

        def take_over(self) -> None:
            self.connection = psycopg.connect(
                stage.url,
                autocommit=True,
                options="-c enable_seqscan=off -c enable_bitmapscan=off -c enable_sort=off",
            )
            taken = take_over(self.connection, 0, "a test")
            self.stop = OnePass()
            self.leader = Leader(
                connection=self.connection,
                reader=Reader(self.connection, taken.checkpoint, 1_000),
                broker=system.publisher,
                routes=system.routes,
                settings=system.settings.relay,
                stop=self.stop,
                history=History(taken, connection=self.connection, broker=system.publisher),
            )

        # The world ----------------------------------------------------------------------------

        @rule(symbol=st.sampled_from(SYMBOLS), events=st.integers(1, 4))
        def write(self, symbol: str, events: int) -> None:
            first = self.prices[symbol]
            self.prices[symbol] += events
            write_quotes(system, range(first, first + events), symbol)

        @rule(symbol=st.sampled_from(SYMBOLS), price=st.integers(0, 6))
        def begin_to_fail(self, symbol: str, price: int) -> None:
            stage.failing.add((symbol, price))

        @precondition(lambda self: bool(stage.failing))
        @rule()
        def stop_failing(self) -> None:
            stage.failing.clear()

        # The relay ----------------------------------------------------------------------------

        @rule()
        def relay_works(self) -> None:
            self.stop.passes = 0
            self.leader.lead()

        @rule()
        def relay_dies(self) -> None:
            self.connection.close()
            self.take_over()

        @rule()
        def retries_are_due(self) -> None:
            self.run("update dovecote.deliveries set next_attempt_at = now() where state = 'retrying'")
            leases.release_unblocked(self.connection, route)
            self.run("select dovecote.wake('dovecote_deliveries')")

        @rule()
        def redis_is_wiped(self) -> None:
            system.broker.client.eval(WIPE, 0, f"{system.settings.redis.namespace}:*")

        # The consumers ------------------------------------------------------------------------

        @rule(which=st.integers(0, 1_000), acknowledged=st.booleans())
        def consume_one(self, which: int, acknowledged: bool) -> None:
            waiting = self.queued()
            if waiting:
                self.act(waiting[which % len(waiting)], acknowledged)

        @rule()
        def consume_all(self) -> None:
            for message in self.queued():
                self.act(message, True)

        @precondition(lambda self: bool(self.seen))
        @rule(which=st.integers(0, 1_000))
        def a_message_comes_again(self, which: int) -> None:
            self.act(self.seen[which % len(self.seen)], False)

        def queued(self) -> list[Message]:
            key = f"{system.settings.redis.namespace}:{route.queue}"
            client: Any = system.broker.client
            stored = [client.hget(f"{key}.msgs", id) for id in client.lrange(key, 0, -1)]
            return [self.read(orjson.loads(message)) for message in stored if message is not None]

        def read(self, message: dict[str, Any]) -> Message:
            replay = message["kwargs"].get("replay")
            return Message(
                message["message_id"],
                message["args"][0],
                message["kwargs"]["retry"],
                UUID(replay) if replay else None,
            )

        def act(self, message: Message, acknowledged: bool) -> None:
            envelopes = [read_envelope(fields) for fields in message.envelopes]
            system.consumer.consume(Bundle(route, envelopes, retry=message.retry, replay=message.replay))
            self.seen.append(message)
            if acknowledged:
                key = f"{system.settings.redis.namespace}:{route.queue}"
                system.broker.client.hdel(f"{key}.msgs", message.id)
                system.broker.client.lrem(key, 0, message.id)

        # The operators ------------------------------------------------------------------------

        @rule(part=st.sampled_from((None, *SYMBOLS)), mode=st.sampled_from(("reprocess", "reprocess", "backfill")))
        def start(self, part: str | None, mode: Any) -> None:
            asked = ReplaySelection(aggregate_type="price", aggregate_id=part) if part else ReplaySelection()
            request = replays.Request(handler=HANDLER, mode=mode, filter=asked, reason="a test", actor="hypothesis")
            try:
                id = replays.start(system.engine, system.routes, request).replay_id
            except replays.ReplayRefused:
                return
            assert id is not None
            if mode == "reprocess":
                wanted = self.run(
                    "select p.event_id from dovecote.processed_events p join dovecote.outbox o on o.id = p.event_id"
                    " where not exists (select from dovecote.deliveries d where d.event_id = p.event_id)"
                    " and (cast(:part as text) is null or o.aggregate_id = :part)",
                    part=part,
                )
                self.asked[id] = {row.event_id for row in wanted}

        @rule(verb=st.sampled_from((replays.pause, replays.resume, replays.cancel)))
        def change(self, verb: Callable[..., replays.Replay]) -> None:
            for replay in replays.list_replays(system.engine, limit=1).items:
                try:
                    verb(system.engine, replay.id, actor="hypothesis")
                except replays.ReplayRefused:
                    continue
                if verb is replays.cancel:
                    self.cancelled[replay.id] = len(self.effects())

        # What must hold -----------------------------------------------------------------------

        def effects(self) -> list[Any]:
            found: list[Any] = self.run("select event_id, symbol, price, replay_id from replay_effects order by n")
            return found

        @invariant()
        def nothing_happens_twice_or_out_of_order(self) -> None:
            effects = self.effects()
            times = Counter((effect.event_id, effect.replay_id) for effect in effects)
            assert max(times.values(), default=1) == 1, "twice for the same replay, or live"
            if route.ordered:
                lines: dict[Any, list[int]] = defaultdict(list)
                for effect in effects:
                    lines[effect.symbol, effect.replay_id].append(effect.price)
                for line, prices in lines.items():
                    assert prices == sorted(prices), line
            for id, count in self.cancelled.items():
                assert id not in {effect.replay_id for effect in effects[count:]}, "a cancelled replay went on"

        @invariant()
        def a_replay_that_is_done_has_left_nothing_behind(self) -> None:
            open_rows = {row.event_id for row in self.run("select event_id from dovecote.deliveries")}
            acted = {(effect.event_id, effect.replay_id) for effect in self.effects()}
            for row in self.run("select id from dovecote.replays where state = 'done'"):
                left = {id for id in self.asked.get(row.id, ()) if (id, row.id) not in acted}
                assert left <= open_rows, "not acted on and not in deliveries"

        @rule()
        def all_comes_to_rest(self) -> None:
            stage.failing.clear()
            for replay in replays.list_replays(system.engine, limit=1).items:
                if replay.state == "paused":
                    replays.resume(system.engine, replay.id, actor="hypothesis")
            for _ in range(2_000):
                self.relay_works()
                self.retries_are_due()
                self.consume_all()
                if self.is_at_rest():
                    break
            assert self.is_at_rest(), (replays.list_replays(system.engine, limit=1).items, self.queued())
            effects = self.effects()
            live = Counter(effect.symbol for effect in effects if effect.replay_id is None)
            late = self.run("select event_id from replay_effects where replay_id is null")
            assert len(late) == sum(self.prices.values()), "each live event once"
            assert live == self.prices
            for id, wanted in self.asked.items():
                acted = {effect.event_id for effect in effects if effect.replay_id == id}
                assert acted <= wanted
                if id not in self.cancelled:
                    assert acted == wanted, "each event of the replay once"

        def is_at_rest(self) -> bool:
            counts = self.run(
                "select (select count(*) from dovecote.outbox) - (select count(*) from dovecote.processed_events)"
                " + (select count(*) from dovecote.deliveries)"
                " + (select count(*) from dovecote.replays where state in ('pending', 'running'))"
            )
            return counts == [(0,)] and not self.queued()

    return Replaying


@pytest.mark.parametrize("ordered", [False, True], ids=["unordered", "ordered"])
def test_replays_hold_their_promises_whatever_happens(settings: Settings, ordered: bool) -> None:
    def note(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        if (event.symbol, int(event.price)) in stage.failing:
            raise RuntimeError("as asked")
        uow.session.execute(
            text(
                "insert into replay_effects (event_id, symbol, price, replay_id) select event_id, :symbol, :price,"
                " replay_id from dovecote.processed_events where event_id = :id and handler_name = :handler"
            ),
            {"symbol": event.symbol, "price": int(event.price), "id": event.event_id, "handler": HANDLER},
        )

    route = a_route(HANDLER, note, ordered=ordered, replayable=True, bundle_size=3, max_attempts=1_000)
    with system_for(settings, (route,)) as system:
        with system.engine.begin() as connection:
            connection.execute(
                text("create table replay_effects (n bigserial, event_id uuid, symbol text, price int, replay_id uuid)")
            )
        stage = Stage(system, settings.database.url.get_secret_value())
        run_state_machine_as_test(machine_on(stage), settings=_few)


_few = hypothesis_settings(
    max_examples=examples(15, 150),
    stateful_step_count=40,
    deadline=None,
    # Every step is a look into two servers.
    suppress_health_check=list(HealthCheck),
)
