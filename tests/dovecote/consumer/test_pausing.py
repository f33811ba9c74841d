"""A paused handler acts on nothing, loses nothing, and goes on in order; its neighbours never notice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from dovecote import cli, operations
from dovecote.operations.handlers import CannotPause
from dovecote.operations.validation import NoReason, WrongRequest
from dovecote.route import Route
from dovecote.unit_of_work import UnitOfWork
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

SystemWith = Callable[..., System]


@pytest.fixture
def system_with(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[SystemWith]:
    with ExitStack() as stack:

        def build(*routes: Route) -> System:
            settings = settings_for(fresh_database_url, servers.redis_url, tmp_path)
            system = stack.enter_context(system_for(settings, routes))
            make_room_for_effects(system.engine)
            return system

        yield build


def pause(system: System, handler: str = "test.note") -> operations.handlers.Handler:
    return operations.handlers.pause(system.engine, system.routes, handler, actor="tester", reason="INC-1")


def resume(system: System, handler: str = "test.note") -> operations.handlers.Handler:
    return operations.handlers.resume(system.engine, system.routes, handler, actor="tester")


def prices(system: System, handler: str = "test.note") -> list[int]:
    return [effect.price for effect in effects_in(system.engine) if effect.handler == handler]


def held(system: System) -> int:
    return int(system.broker.client.llen(f"{system.broker.namespace}:test.held.test.note"))


def change(system: System, query: str) -> None:
    with system.engine.begin() as connection:
        connection.execute(text(query))


@pytest.mark.parametrize("kind", [{}, {"ordered": True}, {"bundle_size": 1}])
def test_a_paused_handler_gets_what_it_missed_in_order_and_its_neighbour_never_waits(
    system_with: SystemWith, kind: dict[str, Any]
) -> None:
    system = system_with(a_route(**{"bundle_size": 3, **kind}), a_route("test.neighbour"))
    with system.relay(), system.workers(threads=1):
        write_quotes(system, range(5))
        system.until_quiet()

        pause(system)
        for price in range(5, 25):
            write_quotes(system, [price])
        eventually(lambda: prices(system, "test.neighbour") == list(range(25)), 20, "the neighbour's events")
        eventually(lambda: held(system) > 0, 20, "something held")
        assert prices(system) == list(range(5))

        resume(system)
        system.until_quiet()

    assert prices(system) == list(range(25))
    assert held(system) == 0


def test_retries_of_a_paused_handler_wait_for_it_and_spend_no_attempt(system_with: SystemWith) -> None:
    broken = True

    def act(event: Any, uow: UnitOfWork, _gateways: object) -> None:
        if broken:
            raise RuntimeError("broken")
        note_as("test.note", event, uow)

    system = system_with(a_route(function=act, max_attempts=1_000))
    with system.running():
        write_quotes(system, range(3))
        eventually(lambda: system.status().handlers["test.note"].retrying == 3, 20, "three failures")
        pause(system)
        change(system, "update dovecote.deliveries set attempts = 500")
        broken = False
        write_quotes(system, range(3, 6))
        eventually(lambda: held(system) > 0, 20, "something held")
        assert prices(system) == []

        resume(system)
        system.until_quiet()

    assert sorted(prices(system)) == list(range(6))


def test_what_is_being_held_while_the_handler_is_resumed_is_not_forgotten(system_with: SystemWith) -> None:
    system = system_with(a_route())
    with system.relay():
        pause(system)
        write_quotes(system, range(3))
        with system.workers():
            eventually(lambda: held(system) == 1, 20, "the bundle held")
        # As if the worker had looked before the resume and held it after: the relay is not notified.
        change(system, "delete from dovecote.paused_handlers")

        with system.workers():
            system.until_quiet()

    assert prices(system) == [0, 1, 2]


def test_a_redis_that_is_wiped_while_a_handler_is_paused_takes_nothing_away(system_with: SystemWith) -> None:
    system = system_with(a_route())
    with system.running():
        pause(system)
        write_quotes(system, range(10))
        eventually(lambda: held(system) > 0, 20, "something held")
        for key in system.broker.client.scan_iter(f"{system.broker.namespace}:*"):
            system.broker.client.delete(key)
        eventually(lambda: held(system) > 0, 20, "it held again")

        resume(system)
        system.until_quiet()

    assert prices(system) == list(range(10))


def test_pausing_is_audited_needs_a_reason_and_can_be_tried_dry(system_with: SystemWith) -> None:
    system = system_with(a_route())

    with pytest.raises(NoReason):
        operations.handlers.pause(system.engine, system.routes, "test.note", actor="tester", reason=" ")
    with pytest.raises(WrongRequest, match=r"no handler 'test\.nope'; there are test\.note"):
        pause(system, "test.nope")
    with pytest.raises(CannotPause, match="is not paused"):
        resume(system)
    dry = operations.handlers.pause(
        system.engine, system.routes, "test.note", actor="tester", reason="a try", dry_run=True
    )
    done = pause(system)
    with pytest.raises(CannotPause, match=r"is paused already, by tester since .* UTC: INC-1"):
        pause(system)
    resumed = resume(system)

    assert dry.paused is None
    assert done.paused is not None
    assert (done.paused.actor, done.paused.reason) == ("tester", "INC-1")
    assert resumed.paused is None
    entries = operations.audit.list_audit_entries(system.engine, action="handlers").items
    assert [(one.action, one.actor, one.reason, one.details["handler"]) for one in entries] == [
        ("handlers.resume", "tester", None, "test.note"),
        ("handlers.pause", "tester", "INC-1", "test.note"),
    ]


def test_the_command_line_pauses_lists_and_resumes(
    fresh_database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", fresh_database_url)
    handler = ROUTES[0].handler

    def run(*words: str) -> Any:
        result = CliRunner().invoke(cli.app, ["handlers", *words, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert run("pause", handler, "--reason", "INC-2", "--dry-run")["dry_run"] is True
    assert [one["paused"] for one in run("list")["handlers"]] == [None] * len(ROUTES)
    run("pause", handler, "--reason", "INC-2", "--actor", "anna")
    paused = {one["name"]: one["paused"] for one in run("list")["handlers"]}
    assert paused[handler]["actor"] == "anna"
    assert CliRunner().invoke(cli.app, ["status"]).stdout.count(f"paused: {handler}, by anna") == 1
    assert run("resume", handler)["paused"] is None


def test_handlers_that_no_route_has_are_listed_with_what_is_left_of_them(
    system_with: SystemWith, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system = system_with(a_route("gone.handler"))
    pause(system, "gone.handler")
    with system.relay():
        eventually(lambda: system.status().relay.leading, 10, "it has subscribed")
    write_quotes(system, [1, 2, 3])
    change(
        system,
        "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type,"
        " state) select 'older.handler', id, position, aggregate_type, aggregate_id, event_type, 'dead'"
        " from dovecote.outbox",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", system.settings.database.url.get_secret_value())

    left = json.loads(CliRunner().invoke(cli.app, ["handlers", "list", "--json"]).stdout)["without_route"]
    printed = CliRunner().invoke(cli.app, ["handlers", "list"]).stdout

    assert [(one["name"], one["dead"], one["event_types"], one["is_paused"]) for one in left] == [
        ("gone.handler", 0, ["pricing.price_quoted.v1"], True),
        ("older.handler", 3, [], False),
    ]
    assert "no route has these any more" in printed
    assert "older.handler" in printed
