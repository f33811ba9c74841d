"""What no route wants is kept and shown; what newer code wants is sent to it, whenever it was written."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import TextClause, text

from dovecote import operations
from dovecote.events import Event
from dovecote.route import Route
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for
from workers.gateways import Gateways


@dataclass(frozen=True, kw_only=True)
class NotedBefore(Event, type="routing.noted.v1", aggregate="note", key="of"):
    of: str
    n: int


@dataclass(frozen=True, kw_only=True)
class Noted(Event, type="routing.noted.v2", aggregate="note", key="of"):
    of: str
    n: int


def note(event: NotedBefore | Noted, uow: UnitOfWork, _gateways: Gateways) -> None:
    uow.session.execute(
        text("insert into effects (handler, event_id, symbol, price) values ('note', :id, :of, :n)"),
        {"id": event.event_id, "of": event.of, "n": event.n},
    )


def route_for(*events: type[Event]) -> Route:
    return Route(
        handler="routing.note", events=events, function=note, queue="test", ordered=True, backoff_seconds=0.02,
        max_backoff_seconds=0.1,
    )  # fmt: skip


OLD, NEW = route_for(NotedBefore), route_for(NotedBefore, Noted)

Deploy = Callable[..., System]


@pytest.fixture
def deploy(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[Deploy]:
    """Build a system of some routes on the same database and queues: the next deploy of it."""
    settings = settings_for(fresh_database_url, servers.redis_url, tmp_path)
    with ExitStack() as stack:
        first = True

        def build(*routes: Route) -> System:
            nonlocal first
            system = stack.enter_context(system_for(settings, routes))
            if first:
                make_room_for_effects(system.engine)
            first = False
            return system

        yield build


def write(system: System, *numbered: tuple[int, int], of: str = "a") -> None:
    with unit_of_work(system.sessions) as uow:
        for version, n in numbered:
            event = {1: NotedBefore, 2: Noted}[version]
            uow.session.execute(
                text("select dovecote.append_event('note', :of, :type, cast(:payload as jsonb))"),
                {
                    "of": of,
                    "type": event.type,
                    "payload": f'{{"of": "{of}", "n": {n}, "occurred_at": "2026-01-01T00:00:00Z"}}',
                },
            )


def noted(system: System) -> list[int]:
    return [effect.price for effect in effects_in(system.engine)]


def published(system: System) -> bool:
    return system.status().relay.lag_events == 0


def test_a_version_written_before_the_code_that_knows_it_reaches_the_handler(deploy: Deploy) -> None:
    old = deploy(OLD)
    with old.running():
        write(old, (1, 1), (2, 2))
        eventually(lambda: noted(old) == [1] and published(old), 30, "the first event done, the second passed over")
        assert [(kind.event_type, kind.events, kind.wanted_by) for kind in old.status().unrouted] == [
            ("routing.noted.v2", 1, ["routing.note"])
        ]

    new = deploy(NEW)
    with new.running():
        eventually(lambda: noted(new) == [1, 2], 30, "the event that the old code passed over")
        assert new.status().unrouted == []


def test_what_an_old_relay_passes_over_in_between_is_sent_by_the_next_new_one(deploy: Deploy) -> None:
    new, old = deploy(NEW), deploy(OLD)
    with new.running():
        write(new, (2, 1))
        eventually(lambda: noted(new) == [1], 30, "the first event")
    with old.relay():  # rolled back
        write(old, (2, 2))
        eventually(lambda: published(old), 30, "the second event passed over")
    assert noted(new) == [1]

    with new.running():
        eventually(lambda: noted(new) == [1, 2], 30, "the second event")


def test_order_holds_across_the_version_that_was_passed_over(deploy: Deploy) -> None:
    old = deploy(OLD)
    with old.relay():
        write(old, (1, 1), (2, 2), (1, 3))
        eventually(lambda: published(old), 30, "everything published")

    new = deploy(NEW)
    with new.workers():
        eventually(lambda: noted(new) == [1], 30, "the first; the third waits behind the second")
        with new.relay():
            eventually(lambda: noted(new) == [1, 2, 3], 30, "all in order")


def test_an_old_consumer_keeps_a_version_it_does_not_know_for_a_newer_one(
    deploy: Deploy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dovecote import events

    system = deploy(NEW)
    monkeypatch.delitem(events._registry, Noted.type)  # what a consumer from before the deploy knows
    with system.running():
        write(system, (2, 1))
        eventually(lambda: system.status().handlers["routing.note"].retrying == 1, 30, "a retry")
        tried_for_long = (
            "select null, count(*) from dovecote.deliveries"
            " where state = 'retrying' and updated_at > first_failed_at + interval '2 s'"
        )
        eventually(lambda: one_number(system, tried_for_long), 30, "more tries than a failing event has")
        assert one_number(system, "select null, attempts from dovecote.deliveries") == 0
        monkeypatch.undo()
        eventually(lambda: noted(system) == [1], 30, "the effect, once the code is new")


def test_a_consumer_keeps_what_is_for_a_handler_that_only_other_code_has(deploy: Deploy) -> None:
    old, new = deploy(a_route("test.first")), deploy(a_route("test.first"), a_route("test.second"))

    def failures() -> list[tuple[str, str, int, str]]:
        with new.engine.connect() as connection:
            query = "select handler_name, state, attempts, error_type from dovecote.deliveries"
            return [tuple(row) for row in connection.execute(text(query))]

    with new.relay():
        with old.workers():
            write_quotes(new, [1])
            eventually(lambda: failures() == [("test.second", "retrying", 0, "UnknownHandler")], 30, "it is kept")
        with new.workers():
            eventually(lambda: len(effects_in(new.engine)) == 2, 30, "the effect, once the code is new")
    assert failures() == []


def one_number(system: System, query: str) -> int:
    with system.engine.connect() as connection:
        return int(connection.execute(text(query)).one()[1])


def test_a_new_handler_gets_only_events_from_now_on(deploy: Deploy) -> None:
    first = deploy(a_route("test.first"))
    with first.running():
        write_quotes(first, [1, 2])
        first.until_quiet()

    both = deploy(a_route("test.first"), a_route("test.second"))
    with both.running():
        write_quotes(both, [3])
        both.until_quiet()

    assert sorted((effect.handler, effect.price) for effect in effects_in(both.engine)) == [
        ("test.first", 1), ("test.first", 2), ("test.first", 3), ("test.second", 3),
    ]  # fmt: skip


def test_a_standby_that_knows_as_much_sends_nothing_again(deploy: Deploy) -> None:
    system = deploy(NEW)
    with system.relay():
        write(system, (1, 1))
        eventually(lambda: published(system), 30, "published")

    with system.relay():
        eventually(lambda: system.status().relay.epoch == 2, 30, "the next leader")
        assert one_number(system, "select null, count(*) from dovecote.relay_state where redis_run_id is not null") == 1


def test_what_a_route_allows_is_known_to_the_database_from_each_deploy_on(deploy: Deploy) -> None:
    """Operators are held to it there, whatever their own code says (migration 0029)."""
    known = text("select replayable, ordered from dovecote.subscriptions")
    for route in (OLD, replace(OLD, replayable=True, ordered=False)):
        system = deploy(route)
        with system.relay():
            _await_known(system, known, [(route.replayable, route.ordered)])


def _await_known(system: System, query: TextClause, allowed: list[tuple[bool, bool]]) -> None:
    def is_known() -> bool:
        with system.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)] == allowed

    eventually(is_known, 20, f"{allowed} in the table of subscriptions")


def test_what_nobody_wants_is_shown_and_stays(deploy: Deploy) -> None:
    system = deploy(OLD)
    with system.relay():
        with unit_of_work(system.sessions) as uow:
            uow.session.execute(
                text("select dovecote.append_event('a', 'b', 'routing.of_nobody.v1', '{}') from generate_series(1, 3)")
            )
        eventually(lambda: operations.status.get_status(system.engine, [OLD]).unrouted, 30, "the type shown")

    (kind,) = system.status().unrouted
    assert (kind.event_type, kind.events, kind.wanted_by) == ("routing.of_nobody.v1", 3, [])
    assert kind.last_position - kind.first_position == 2
