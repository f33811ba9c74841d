"""A replay gives a handler its events again: what is missing once, or all of them once more, whatever breaks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import make_url, text

from domain.pricing import PriceQuoted
from dovecote import operations
from dovecote.operations import doctor, replays
from dovecote.operations.replays import ReplayRefused, Request
from dovecote.operations.retention import Archived
from dovecote.operations.validation import WrongRequest
from dovecote.route import Route
from dovecote.store.connections import connect
from dovecote.store.replays import ReplaySelection
from dovecote.unit_of_work import UnitOfWork
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for
from workers.gateways import Gateways

pytestmark = pytest.mark.servers

SystemWith = Callable[..., System]


@pytest.fixture
def system_with(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[SystemWith]:
    """Builds this test's system; settings are given by their long names without the prefix."""
    with ExitStack() as stack:

        def build(*routes: Route, **settings: object) -> System:
            variables = {f"DOVECOTE_{name}": str(value) for name, value in settings.items()}
            settings_ = settings_for(fresh_database_url, servers.redis_url, tmp_path, **variables)
            system = stack.enter_context(system_for(settings_, routes or (a_replayable_route(),)))
            make_room_for_effects(system.engine)
            return system

        yield build


def a_replayable_route(**more: Any) -> Route:
    return a_route(**{"replayable": True, "bundle_size": 20, **more})


def ask(system: System, mode: str = "reprocess", **more: Any) -> Request:
    given: dict[str, Any] = {"handler": "test.note", "reason": "a test", "actor": "tester", **more}
    return Request(mode=mode, filter=given.pop("filter", ReplaySelection()), **given)  # type: ignore[arg-type]  # a word of the test


def replay(system: System, mode: str = "reprocess", **more: Any) -> UUID:
    id = replays.start(system.engine, system.routes, ask(system, mode, **more)).replay_id
    assert id is not None
    return id


def until_over(system: System, id: UUID, within_seconds: float = 30) -> replays.Replay:
    shown: Callable[[], replays.Replay] = partial(replays.get_replay, system.engine, id)
    eventually(lambda: shown().is_over, within_seconds, f"the end of the replay: {shown()}")
    return shown()


def prices(system: System, symbol: str = "EUR") -> list[int]:
    return [effect.price for effect in effects_in(system.engine) if effect.symbol == symbol]


def value(system: System, query: str, **parameters: object) -> Any:
    with system.engine.connect() as connection:
        return connection.scalar(text(query), parameters)


def change(system: System, query: str, **parameters: object) -> None:
    with system.engine.begin() as connection:
        connection.execute(text(query), parameters)


def time_between(system: System) -> datetime:
    """A time that lies between the ids made before and after this call."""
    time.sleep(0.005)  # an id has the millisecond
    between: datetime = value(system, "select clock_timestamp()")
    time.sleep(0.005)  # as above
    return between


# What is asked for --------------------------------------------------------------------------------


def test_the_dry_run_counts_exactly_and_does_nothing(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(30))
        write_quotes(system, range(10), "USD")
        system.until_quiet()

        plan = replays.plan(
            system.engine,
            system.routes,
            ask(system, filter=ReplaySelection(aggregate_type="price", aggregate_id="USD")),
        )

    assert (plan.events, plan.first_position, plan.last_position) == (10, 31, 40)
    assert [event.position for event in plan.sample] == [31, 32, 33, 34, 35]
    assert plan.replay_id is None
    assert value(system, "select count(*) from dovecote.replays") == 0
    assert value(system, "select count(*) from dovecote.audit_log") == 0


def test_each_filter_takes_exactly_its_events(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(5))
        first = time_between(system)
        write_quotes(system, range(5, 10))
        second = time_between(system)
        write_quotes(system, range(10, 15), "USD")
        system.until_quiet()
        ids = tuple(
            UUID(str(id)) for id in value(system, "select array_agg(id) from dovecote.outbox where position in (2, 15)")
        )

        asked: list[tuple[dict[str, Any], set[int]]] = [
            ({"filter": ReplaySelection(since=first, until=second)}, {6, 7, 8, 9, 10}),
            ({"filter": ReplaySelection(since=second)}, {11, 12, 13, 14, 15}),
            ({"filter": ReplaySelection(from_position=4, upto_position=6)}, {4, 5, 6}),
            ({"filter": ReplaySelection(aggregate_type="price", aggregate_id="USD", upto_position=12)}, {11, 12}),
            ({"filter": ReplaySelection(event_types=("pricing.price_quoted.v1",), from_position=15)}, {15}),
            ({"event_ids": ids}, {2, 15}),
        ]
        for number, (what, positions) in enumerate(asked, 1):
            id = replay(system, **what)
            assert until_over(system, id).done == len(positions), what
            acted = value(
                system,
                "select array_agg(o.position) from dovecote.outbox o join dovecote.processed_events p"
                " on p.event_id = o.id where p.replay_id = :id",
                id=id,
            )
            assert set(acted) == positions, what
            assert value(system, "select count(*) from dovecote.audit_log where action = 'replay.start'") == number


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ({"handler": "test.nobody"}, WrongRequest, "there is no handler 'test.nobody'; there are test.note"),
        ({"filter": ReplaySelection(event_types=("billing.x.v1",))}, WrongRequest, "does not take 'billing.x.v1'"),
        ({"filter": ReplaySelection(from_position=9, upto_position=3)}, WrongRequest, "before it begins"),
        ({"filter": ReplaySelection(aggregate_id="EUR")}, WrongRequest, "needs its type too"),
        ({"rate": 0}, WrongRequest, "at least 1"),
        ({"reason": " "}, WrongRequest, "needs a reason"),
        ({"event_ids": ()}, WrongRequest, "1 to 100,000 event ids"),
        ({"filter": ReplaySelection(aggregate_type="nothing")}, ReplayRefused, "there is nothing to replay"),
        ({"handler": "test.strict"}, ReplayRefused, "test.strict may not act again: it pays people"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    system_with: SystemWith, what: dict[str, Any], error: type[Exception], words: str
) -> None:
    system = system_with(a_replayable_route(), a_route("test.strict", replay_note="it pays people"))
    with system.running():
        write_quotes(system, range(3))
        system.until_quiet()

    with pytest.raises(error, match=words):
        replay(system, **what)

    assert value(system, "select count(*) from dovecote.replays") == 0


def test_what_was_dropped_is_refused_with_the_name_of_its_archive(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(3))
        system.until_quiet()
    gone = UUID("01800000-0000-7000-8000-000000000001")  # of April 2022
    change(
        system,
        """
        insert into dovecote.dropped_partitions (week, lower_id, upper_id, events, processed, first_position,
            last_position, first_created_at, last_created_at, archive, checksum, actor)
        values ('2022w13', dovecote.uuid_v7_lower_bound('2022-03-28'), dovecote.uuid_v7_lower_bound('2022-04-11'), 9, 9,
            -9, -1, '2022-03-28', '2022-04-10', '/archives/2022w13', 'checksum', 'test')
        """,
    )

    for what in ({"filter": ReplaySelection(until=datetime(2022, 4, 2, tzinfo=UTC))}, {"event_ids": (gone,)}):
        with pytest.raises(Archived, match="week 2022w13 is in /archives/2022w13"):
            replay(system, **what)
    with pytest.raises(ReplayRefused, match=r"1 of these events are not in the outbox, such as 01900000"):
        replay(system, event_ids=(UUID("01900000-0000-7000-8000-000000000001"),))
    assert value(system, "select count(*) from dovecote.replays") == 0


def test_a_handler_has_one_replay_at_a_time(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(3))
        system.until_quiet()
    first = replay(system)

    with pytest.raises(ReplayRefused, match=f"has a replay already: {first}"):
        replay(system)

    replays.cancel(system.engine, first, actor="tester")
    replay(system)


# Acting again -------------------------------------------------------------------------------------


def test_each_event_is_acted_on_again_once_per_replay(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(300))
        system.until_quiet()

        for times in (2, 3):
            done = until_over(system, replay(system))

            assert (done.state, done.total, done.done, done.acted) == ("done", 300, 300, 300)
            assert Counter(prices(system)) == dict.fromkeys(range(300), times)
    assert (
        value(system, "select details ->> 'done' from dovecote.audit_log where action = 'replay.done' limit 1") == "300"
    )


def test_an_event_that_fails_is_retried_for_the_replay_and_acts_once(system_with: SystemWith) -> None:
    tries: Counter[int] = Counter()

    def fail_at_first_again(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        tries[int(event.price)] += 1
        if event.price == 7 and 1 < tries[7] < 5:
            raise RuntimeError("not yet")
        note_as("test.note", event, uow)

    system = system_with(a_replayable_route(function=fail_at_first_again))
    with system.running():
        write_quotes(system, range(30))
        system.until_quiet()

        id = replay(system)
        until_over(system, id)
        eventually(lambda: value(system, "select count(*) from dovecote.deliveries") == 0, 20, "the retry")

    assert Counter(prices(system)) == dict.fromkeys(range(30), 2)
    assert value(system, "select count(*) from dovecote.processed_events where replay_id = :id", id=id) == 30


def test_what_is_in_deliveries_is_left_alone(system_with: SystemWith) -> None:
    def refuse_seven(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        if event.price == 7:
            raise RuntimeError("never")
        note_as("test.note", event, uow)

    system = system_with(a_replayable_route(function=refuse_seven, max_attempts=1))
    with system.running():
        write_quotes(system, range(10))
        system.until_quiet()
        request = ask(system)

        plan = replays.plan(system.engine, system.routes, request)
        until_over(system, replay(system))

    assert (plan.events, plan.left_alone) == (9, 1)
    assert value(system, "select state || attempts from dovecote.deliveries") == "dead1"
    with pytest.raises(ReplayRefused, match="acted on all that match; 1 are in deliveries"):
        replay(system, "backfill")


def test_an_ordered_handler_acts_again_in_order_though_one_event_fails(system_with: SystemWith) -> None:
    again = threading.Event()
    tries: Counter[tuple[str, int]] = Counter()

    def fail_now_and_then(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        key = event.symbol, int(event.price)
        if again.is_set() and event.price % 9 == 4:
            tries[key] += 1
            if tries[key] < 3:
                raise RuntimeError("not yet")
        note_as("test.note", event, uow)

    system = system_with(a_replayable_route(function=fail_now_and_then, ordered=True, bundle_size=7))
    symbols = ("EUR", "USD", "CHF", "GBP")
    with system.running():
        for price in range(40):
            for symbol in symbols:
                write_quotes(system, [price], symbol)
        system.until_quiet()
        again.set()

        id = replay(system)
        write_quotes(system, range(100, 130))
        until_over(system, id)
        eventually(lambda: value(system, "select count(*) from dovecote.deliveries") == 0, 30, "the retries")
        system.until_quiet()

    for symbol in symbols:
        seen = prices(system, symbol)
        live = [price for price in seen if price >= 100]
        assert live == sorted(live)
        assert [price for price in seen if price < 100] == [*range(40), *range(40)], symbol


# What is missing ----------------------------------------------------------------------------------


def test_a_new_handler_is_given_what_was_before_it(system_with: SystemWith) -> None:
    system = system_with(a_replayable_route())
    newcomer = a_replayable_route(handler="test.new")
    with system.running():
        write_quotes(system, range(100))
        system.until_quiet()
    system.routes = (*system.routes, newcomer)
    from dovecote.bootstrap import declare_handlers

    declare_handlers(system.broker, system.consumer, [newcomer])
    with system.running():
        write_quotes(system, range(100, 110))
        eventually(lambda: sum(e.handler == "test.new" for e in effects_in(system.engine)) == 10, 10, "the new events")

        done = until_over(system, replay(system, "backfill", handler="test.new"))

    assert (done.total, done.done) == (100, 100)
    new = Counter(effect.price for effect in effects_in(system.engine) if effect.handler == "test.new")
    assert new == dict.fromkeys(range(110), 1)
    assert Counter(prices(system)) == Counter(dict.fromkeys(range(110), 2)), "one of each handler"


def test_an_ordered_handler_is_not_given_what_was_before_it(system_with: SystemWith) -> None:
    system = system_with(a_route("test.other"))
    with system.relay():
        write_quotes(system, range(10))
        eventually(lambda: system.status().relay.lag_events == 0, 10, "the first events")
    system.routes = (*system.routes, a_replayable_route(ordered=True))
    with system.relay():
        eventually(lambda: value(system, "select count(*) from dovecote.subscriptions") == 2, 10, "a subscription")

    with pytest.raises(ReplayRefused, match="has its events from position 11 on"):
        replay(system, "backfill")


def test_what_is_still_queued_is_not_queued_again(system_with: SystemWith) -> None:
    system = system_with()
    key = f"{system.settings.redis.namespace}:test"
    client: Any = system.broker.client
    with system.relay():
        write_quotes(system, range(100))
        eventually(lambda: client.llen(key) == 5, 10, "five bundles")
        id = replay(system, "backfill")
        eventually(lambda: replays.get_replay(system.engine, id).state == "pending", 1, "a replay")
        time.sleep(1.0)  # the relay has looked at it by now; there is nothing to be seen of what it does not do

        assert client.llen(key) == 5
        with system.workers():
            done = until_over(system, id)

    assert (done.done, done.total) == (100, 100)
    assert Counter(prices(system)) == dict.fromkeys(range(100), 1)


# Pausing, cancelling, and the pace ----------------------------------------------------------------


def slow(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
    time.sleep(0.002)
    note_as("test.note", event, uow)


@pytest.mark.once
def test_pausing_and_cancelling_take_effect_after_one_wave(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(2_000))
        system.until_quiet()
        id = replay(system, rate=400)
        eventually(lambda: replays.get_replay(system.engine, id).done > 50, 20, "a start")

        replays.pause(system.engine, id, actor="tester", reason="lunch")
        time.sleep(1.5)  # "within a second or two"
        paused = len(effects_in(system.engine))
        time.sleep(0.5)  # and stays so
        assert len(effects_in(system.engine)) == paused

        replays.resume(system.engine, id, actor="tester")
        eventually(lambda: len(effects_in(system.engine)) > paused + 100, 20, "some more")
        replays.cancel(system.engine, id, actor="tester", reason="enough")
        time.sleep(1.0)  # "within a second or two"
        cancelled = len(effects_in(system.engine))
        time.sleep(0.5)  # and stays so
        assert len(effects_in(system.engine)) == cancelled < 4_000

    assert max(Counter(prices(system)).values()) == 2
    audited = value(
        system, "select string_agg(action || ':' || coalesce(reason, ''), ' ' order by id) from dovecote.audit_log"
    )
    assert audited == "replay.start:a test replay.pause:lunch replay.resume: replay.cancel:enough"
    with pytest.raises(ReplayRefused, match="is cancelled: there is nothing to resume"):
        replays.resume(system.engine, id, actor="tester")


def test_a_replay_waits_while_its_handler_is_paused(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(20))
        system.until_quiet()
        operations.handlers.pause(system.engine, system.routes, "test.note", actor="tester", reason="a test")

        id = replay(system)
        time.sleep(1.5)  # the relay has looked at it by now; there is nothing to be seen of what it does not do
        waiting = replays.get_replay(system.engine, id)
        sent = system.publisher.holds_messages("test")
        operations.handlers.resume(system.engine, system.routes, "test.note", actor="tester")
        done = until_over(system, id)

    assert (waiting.done, waiting.handler_is_paused, sent) == (0, True, False)
    assert (done.done, done.handler_is_paused) == (20, False)


def test_a_login_with_the_operator_s_role_may_do_all_of_it(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(5))
        system.until_quiet()
    login = f"operator_{uuid4().hex[:8]}"
    change(system, f"create role {login} login password 'secret' in role dovecote_operator")
    url = make_url(system.settings.database.url.get_secret_value()).set(username=login, password="secret")
    engine = connect(url.render_as_string(hide_password=False))
    try:
        id = replays.start(engine, system.routes, ask(system)).replay_id
        assert id is not None
        replays.pause(engine, id, actor="somebody")
        replays.cancel(engine, id, actor="somebody", dry_run=True)
        replays.cancel(engine, id, actor="somebody")
        settings = settings_for(url.render_as_string(hide_password=False), "redis://127.0.0.1:1/0", Path("/nowhere"))
        examined = doctor.examine(settings, system.routes)
    finally:
        engine.dispose()
        change(system, f"drop role {login}")

    assert replays.get_replay(system.engine, id).state == "cancelled"
    assert value(system, "select count(*) from dovecote.audit_log where login = :login", login=login) == 3
    assert "postgres.partitions" in {finding.check for finding in examined.findings}


@pytest.mark.once
def test_a_rate_is_kept(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(300))
        system.until_quiet()

        began = time.monotonic()
        until_over(system, replay(system, rate=150))

        assert time.monotonic() - began > 1.5


@pytest.mark.alone
@pytest.mark.once
def test_live_events_are_not_kept_waiting_by_a_replay(system_with: SystemWith) -> None:
    system = system_with(a_replayable_route(function=slow, bundle_size=100))
    with system.running():
        write_quotes(system, range(3_000))
        system.until_quiet(60)
        id = replay(system)
        eventually(lambda: replays.get_replay(system.engine, id).done > 300, 20, "a replay under way")

        waits = []
        for price in range(10_000, 10_005):
            began = time.monotonic()
            write_quotes(system, [price], "LIVE")
            eventually(lambda price=price: price in prices(system, "LIVE"), 20, "the live effect")  # type: ignore[misc]  # bound at once
            waits.append(time.monotonic() - began)
        still = replays.get_replay(system.engine, id)

    assert not still.is_over, "it must have been under way all the time"
    assert sorted(waits)[2] < 2.0


# What breaks --------------------------------------------------------------------------------------


def wipe(system: System) -> None:
    client: Any = system.broker.client
    script = "for _, key in ipairs(redis.call('keys', ARGV[1])) do redis.call('del', key) end"
    client.eval(script, 0, f"{system.settings.redis.namespace}:*")


@pytest.mark.once
def test_losing_redis_or_the_relay_s_connection_in_the_middle_changes_nothing(system_with: SystemWith) -> None:
    system = system_with(RELAY__STANDBY_INTERVAL_SECONDS=0.05)
    with system.running():
        write_quotes(system, range(1_000))
        system.until_quiet()
        id = replay(system, rate=1_000)
        for part in range(1, 5):
            eventually(lambda part=part: replays.get_replay(system.engine, id).done > part * 150, 30, "some more")  # type: ignore[misc]  # bound at once
            if part % 2:
                wipe(system)
            else:
                change(
                    system,
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where application_name = 'dovecote relay' and datname = current_database()",
                )
        done = until_over(system, id, 60)

    assert done.done == 1_000
    assert Counter(prices(system)) == dict.fromkeys(range(1_000), 2)


@pytest.mark.once
def test_a_replay_goes_on_in_the_next_relay(system_with: SystemWith) -> None:
    system = system_with()
    with system.running():
        write_quotes(system, range(400))
        system.until_quiet()
    with system.workers():
        with system.relay():
            id = replay(system, rate=300)
            eventually(lambda: replays.get_replay(system.engine, id).done > 50, 20, "a start")
        between = replays.get_replay(system.engine, id)
        with system.relay():
            done = until_over(system, id)

    assert between.state == "running"
    assert between.done < 400 == done.done
    assert Counter(prices(system)) == dict.fromkeys(range(400), 2)


def test_time_ranges_and_positions_survive_the_row() -> None:
    asked = ReplaySelection(event_types=("a.b.v1",), since=datetime(2026, 11, 20, tzinfo=UTC), upto_position=7)

    assert ReplaySelection.from_json(asked.as_json()) == asked
    assert asked.since is not None
    assert asked.since + timedelta(days=1) > asked.since
