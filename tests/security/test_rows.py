"""A row that this version does not understand, or that somebody wrote by hand, ends no relay and hides no other row."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dovecote.operations import replays
from dovecote.operations.doctor import examine
from dovecote.store.active_replays import ActiveReplay
from dovecote.store.loaders import loads_anything
from dovecote.store.replays import NotUnderstood, ReplaySelection
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.profiles import examples
from tests.support.system import System, system_for

INSERT = """
    insert into dovecote.replays
        (actor, reason, mode, handler_name, filter, state, total, upto_position, rate)
    values ('x', 'y', %s, %s, %s::jsonb, 'pending', 1, %s, %s) returning id
"""


@pytest.fixture
def system(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[System]:
    routes = [a_route(replayable=True), a_route("test.once", queue="once", replayable=False)]
    with system_for(settings_for(fresh_database_url, servers.redis_url, tmp_path), routes) as system:
        make_room_for_effects(system.engine)
        loads_anything(system.engine).dispose()  # for connections from now on
        yield system


@pytest.fixture
def rows(fresh_database_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(fresh_database_url, autocommit=True) as connection:
        yield connection


def add(
    rows: psycopg.Connection[Any],
    *,
    mode: str = "backfill",
    handler: str = "test.note",
    filter: str = "{}",
    upto: int = 1,
    rate: int | None = None,
) -> UUID:
    (id,) = rows.execute(INSERT, (mode, handler, filter, upto, rate)).fetchone() or (None,)
    rows.execute("notify dovecote_replays")
    assert isinstance(id, UUID)
    return id


@pytest.mark.servers
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"filter": '{"colour": "red"}'}, "unknown key 'colour' in its filter"),
        ({"filter": "null"}, "its filter is not a JSON object but null"),
        ({"filter": '{"since": null}'}, "since in its filter is null"),
        ({"filter": '{"event_types": []}'}, "event_types in its filter is a list"),
        ({"filter": '{"from_position": %s}' % ("9" * 5_000)}, "unknown key 'unreadable' in its filter"),
        ({"filter": "[" * 3_000 + "]" * 3_000}, "unknown key 'unreadable' in its filter"),
        ({"rate": 0}, "its rate is 0, and is at least 1 event a second"),
        ({"rate": -1_000_000_000}, "its rate is -1000000000, and is at least 1 event a second"),
        ({"upto": 2**62}, f"it ends at position {2**62}, which no event has yet"),
    ],
    ids=range(9),
)
def test_a_replay_that_is_not_understood_is_left_alone_and_shown(
    system: System, rows: psycopg.Connection[Any], row: dict[str, Any], problem: str
) -> None:
    with system.running():
        write_quotes(system, [1])
        system.until_quiet()
        id = add(rows, **row)
        rows.execute(
            "update dovecote.replays set created_at = 'infinity', updated_at = '-infinity' where id = %s", (id,)
        )

        eventually(lambda: replays.get_replay(system.engine, id).problem is not None, 10, "a problem")
        write_quotes(system, [2])
        system.until_quiet()

    shown = replays.get_replay(system.engine, id)
    assert (shown.state, shown.problem) == ("pending", problem)
    assert [one.problem for one in replays.list_replays(system.engine).items] == [problem]
    found = {finding.check: finding for finding in examine(system.settings, system.routes).findings}
    assert problem in found["rows.replays"].found


@pytest.mark.servers
def test_other_replays_go_on_beside_one_that_is_not_understood(system: System, rows: psycopg.Connection[Any]) -> None:
    with system.running():
        write_quotes(system, [1])
        system.until_quiet()
        before = len(effects_in(system.engine))
        add(rows, handler="test.once", filter='{"colour": 1}')
        good = add(rows, mode="reprocess", filter="{}", upto=1)

        eventually(lambda: replays.get_replay(system.engine, good).state == "done", 10, "the other replay")

    assert len(effects_in(system.engine)) == before + 1


@pytest.mark.servers
def test_a_replay_that_acts_again_is_refused_by_the_relay_where_the_route_does_not_allow_it(
    system: System, rows: psycopg.Connection[Any]
) -> None:
    with system.running():
        write_quotes(system, [1])
        system.until_quiet()
        before = effects_in(system.engine)
        id = add(rows, mode="reprocess", handler="test.once")

        eventually(lambda: replays.get_replay(system.engine, id).state == "cancelled", 10, "the refusal")

    assert "may not act again" in (replays.get_replay(system.engine, id).problem or "")
    assert effects_in(system.engine) == before
    assert rows.execute("select action, affected from dovecote.audit_log").fetchall() == [("replay.refuse", 0)]


@pytest.mark.servers
@pytest.mark.parametrize(
    "statement",
    [
        "insert into dovecote.published_batches (positions, events, epoch) values ('{(,)}', 1, 1)",
        "insert into dovecote.published_batches (positions, events, epoch) values ('{[5,)}', 1, 1)",
        "insert into dovecote.published_batches (positions, events, epoch) values ('{}', -5, -1)",
        "insert into dovecote.published_batches (positions, events, epoch)"
        " values ('{[-5,1)}', 1, 1), ('{[-9,0)}', 1, 1)",
        "update dovecote.relay_state set history = null, instance = '1 1 99999999999999999999', epoch = -5",
        "update dovecote.relay_state set redis_run_id = 'x@' || repeat('9', 5000), instance = repeat('9', 5000)",
        "update dovecote.relay_state set seen_at = 'infinity', owned_since = '-infinity', checkpoint = -7",
        "insert into dovecote.subscriptions (handler_name, event_type, since_position) values (E'\\x1b[2J', 'x', -1)",
        "insert into dovecote.paused_handlers (handler_name, actor, reason, paused_at)"
        " values ('nobody', '', '', 'infinity')",
        "insert into dovecote.postponed (handler_name, after_position, since) values ('test.note', 4611686018427387904,"
        " '-infinity')",
        "insert into dovecote.unrouted_types (event_type, events, first_position, last_position, first_seen_at)"
        " values ('', -1, 5, -5, 'infinity')",
        "insert into dovecote.audit_log (actor, action, details)"
        " values ('x', 'y', ('[' || repeat('1', 5000) || ']')::jsonb)",
        "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type,"
        " state, next_attempt_at, updated_at) values ('test.note', dovecote.uuid_v7(), 1, 'a', '1', 'x', 'retrying',"
        " now(), 'infinity')",
    ],
    ids=range(13),
)
def test_an_odd_row_stops_no_event_and_no_command(
    system: System, rows: psycopg.Connection[Any], statement: str
) -> None:
    rows.execute(statement)

    with system.running():
        write_quotes(system, [1])
        eventually(lambda: len(effects_in(system.engine)) == 2, 15, "the effects of both handlers")
        system.status()
    assert examine(system.settings, system.routes).findings


# The function that reads a row -----------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.datetimes().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([*ReplaySelection.__dataclass_fields__, "colour", "", "\x1b[2J"])
ROUTE = a_route()


@settings(max_examples=examples(300, 100_000))
@given(
    filter=st.dictionaries(KEYS | st.text(max_size=5), JSON, max_size=4) | JSON,
    mode=st.sampled_from(["backfill", "reprocess", "", "REPROCESS"]) | st.text(max_size=10),
    rate=st.none() | st.integers(-(2**31), 2**31 - 1),
    cursor=st.integers(-(2**63), 2**63 - 1),
)
@example(filter={"event_types": "pricing.price_quoted.v1"}, mode="backfill", rate=None, cursor=0)
def test_any_row_is_understood_or_refused_in_a_sentence(filter: Any, mode: str, rate: int | None, cursor: int) -> None:
    row = ActiveReplay(
        UUID(int=0), ROUTE.handler, mode, filter, False, rate, cursor, 1, datetime(2026, 1, 1, tzinfo=UTC)
    )
    problem = None
    try:
        asked = row.understood(ROUTE)
    except NotUnderstood as reason:
        problem = str(reason)
    if problem is not None:
        assert len(problem) < 400
        assert problem.isprintable()
    else:
        assert ReplaySelection.from_json(json.loads(json.dumps(asked.as_json()))) == asked
        assert set(asked.event_types or ()) <= set(ROUTE.event_types)
