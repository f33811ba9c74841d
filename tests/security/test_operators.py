"""A login of an operator changes what it likes, leaves no line in the audit log, or one in the name of somebody else.

Each verb is a function of the database that writes its own line in its own transaction. Here the functions are called
directly, as a hostile client would: by every role, with hostile arguments, from hostile sessions.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from psycopg import errors
from psycopg.types.json import Jsonb
from sqlalchemy import Engine, text

from dovecote import operations
from dovecote.operations import replays
from dovecote.operations.deliveries import DeliverySelection
from dovecote.route import Route
from dovecote.store.connections import connect
from dovecote.store.replays import ReplaySelection
from tests.conftest import Servers, settings_for
from tests.security.logins import (
    CLAIMED,
    HANDLER,
    TYPE,
    VERBS,
    Connection,
    Database,
    fill,
    lines,
    logins_in,
    one,
    state_of,
)
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def logins(database_url: str) -> Iterator[Database]:
    with logins_in(database_url) as database:
        yield database


@pytest.fixture
def database(logins: Database) -> Database:
    fill(logins)
    return logins


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_and_its_line_are_one(database: Database, verb: str) -> None:
    call, action, affected = VERBS[verb]
    before = state_of(database)
    with database.session("operator") as operator:
        with operator.transaction(force_rollback=True):
            operator.execute(f"select * from {call}", CLAIMED)
        rolled_back = state_of(database)
        operator.execute(f"select * from {call}", CLAIMED)

    assert rolled_back == before
    assert lines(database) == [("ada", database.name("operator"), action, "INC-7", affected)]
    assert state_of(database).splitlines()[:4] != before.splitlines()[:4]


@pytest.mark.parametrize("role", ["writer", "worker", "viewer", "service", "stranger"])
def test_nobody_else_may_call_a_verb(database: Database, role: str) -> None:
    before = state_of(database)
    with database.session(role) as session:
        for call, _, _ in VERBS.values():
            with pytest.raises(errors.InsufficientPrivilege):
                session.execute(f"select * from {call}", CLAIMED)
        for call in (
            "change_deliveries('retry', 'a', 'b', '{}', now(), 1)",
            "change_replay('cancel', 'a', 'b', null, '{}', 'done')",
            "write_audit_line('alice', 'deliveries.retry', 'framed', 1, '{}')",
            "unsubscribe_handler('test.note', 'alice')",
            "make_partitions(1)",
            "move_misplaced_rows()",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                session.execute(f"select dovecote.{call}")

    assert state_of(database) == before


def test_an_operator_has_no_other_way(database: Database) -> None:
    before = state_of(database)
    with database.session("operator") as operator:
        for statement in (
            "insert into dovecote.audit_log (actor, action, reason) values ('alice', 'deliveries.discard', 'framed')",
            "update dovecote.audit_log set actor = 'alice'",
            "delete from dovecote.audit_log",
            "truncate dovecote.audit_log",
            "insert into dovecote.deliveries select * from dovecote.deliveries",
            "update dovecote.deliveries set state = 'discarded'",
            "delete from dovecote.deliveries",
            "select * from dovecote.deliveries for update",
            "do $$ begin lock table dovecote.deliveries in row exclusive mode; end $$",
            "insert into dovecote.replays (actor, reason, mode, handler_name, filter)"
            " values ('x', 'y', 'reprocess', 'verification.send_code', '{\"colour\": \"red\"}')",
            "update dovecote.replays set state = 'done'",
            "insert into dovecote.paused_handlers (handler_name, actor, reason) values ('a', 'b', 'c')",
            "delete from dovecote.paused_handlers",
            "update dovecote.subscriptions set replayable = true",
            "select dovecote.write_audit_line('alice', 'deliveries.retry', 'framed', 1, '{}')",
            "select dovecote.change_deliveries('retry', 'a', 'b', '{}', now(), 1)",
            "select dovecote.change_replay('cancel', 'a', 'b', null, '{}', 'done')",
            "select dovecote.release_behind('{test.note}', '{}')",
            "select dovecote.recover_sequence()",
            "select dovecote.reopen_progress()",
            "select dovecote.make_partitions(1)",
            "alter table dovecote.audit_log disable trigger check_audit_line",
            "set session_replication_role = replica",
            "set session authorization dovecote_owner",
            "set role dovecote_owner",
        ):
            with pytest.raises(errors.InsufficientPrivilege):
                operator.execute(statement)

    assert state_of(database) == before


@pytest.mark.parametrize("through", ["dovecote_operator", "none"])
def test_the_login_is_that_of_the_session(database: Database, through: str) -> None:
    with database.session("operator") as operator:
        operator.execute(f"set role {through}")
        operator.execute("select dovecote.pause_handler('dovecote_owner', 'why', 'test.note')")

    assert [line[:2] for line in lines(database)] == [("dovecote_owner", database.name("operator"))]


# Hostile sessions -------------------------------------------------------------------------------------


def test_what_a_session_makes_in_pg_temp_is_not_looked_at(database: Database) -> None:
    with database.session("operator") as operator:
        for statement in (
            "create temp table deliveries (like dovecote.deliveries)",
            "create temp table audit_log (like dovecote.audit_log)",
            "create temp table replays (like dovecote.replays)",
            "create function pg_temp.pwned() returns boolean language plpgsql as"
            " $$ begin raise exception 'the bait was taken by %', current_user; end $$",
            "create domain pg_temp.jsonb as pg_catalog.jsonb check (pg_temp.pwned())",
            "create domain pg_temp.text as pg_catalog.text check (pg_temp.pwned())",
            "create function pg_temp.clock_timestamp() returns timestamptz language sql as"
            " $$ select now() from (select pg_temp.pwned()) x $$",
            "create function pg_temp.btrim(pg_catalog.text) returns pg_catalog.text language sql as"
            " $$ select 'x' from (select pg_temp.pwned()) x $$",
            "create function pg_temp.same(pg_catalog.text, pg_catalog.text) returns boolean language sql as"
            " $$ select pg_temp.pwned() $$",
            "create operator pg_temp.= (leftarg = pg_catalog.text, rightarg = pg_catalog.text,"
            " function = pg_temp.same)",
            "set search_path = pg_temp, dovecote, pg_catalog",
            "set transform_null_equals = on",
            "set timezone = 'Asia/Kathmandu'",
            "set datestyle = 'SQL, DMY'",
        ):
            operator.execute(statement)
        for call, _, _ in VERBS.values():
            with suppress(errors.ObjectNotInPrerequisiteState):  # an earlier one has done it
                operator.execute(f"select {call.replace('name =', 'name operator(pg_catalog.=)')}", CLAIMED)

    assert {line[2] for line in lines(database)} >= {"deliveries.retry", "handlers.pause", "replay.pause"}
    assert {line[1] for line in lines(database)} == {database.name("operator")}


def test_a_verb_that_is_held_open_makes_the_next_one_wait_for_a_bounded_time(database: Database) -> None:
    with database.session() as admin:
        settings = one(admin, "select proconfig from pg_proc where oid = 'dovecote.pause_handler'::regproc")
        assert "lock_timeout=10s" in settings
        admin.execute("alter function dovecote.pause_handler set lock_timeout = '100ms'")
    try:
        with database.session("operator") as held, held.transaction(force_rollback=True):
            held.execute("select dovecote.pause_handler('mallory', 'for ever', 'test.note')")
            engine = connect(database.url_of("operator"))
            try:
                with pytest.raises(operations.handlers.CannotPause, match="somebody else is changing the same"):
                    operations.handlers.pause(engine, [a_route(HANDLER)], HANDLER, actor="ada", reason="why")
            finally:
                engine.dispose()
            with database.session("worker") as worker:
                worker.execute("set statement_timeout = '2s'")
                worker.execute("select * from dovecote.deliveries for update")
    finally:
        with database.session() as admin:
            admin.execute("alter function dovecote.pause_handler set lock_timeout = '10s'")

    assert lines(database) == []


# The engine's login -------------------------------------------------------------------------------------


def test_a_worker_writes_the_relay_s_lines_and_nobody_else_s(database: Database) -> None:
    with database.session("worker") as worker:
        for actor, action in (("alice", "deliveries.retry"), ("alice", "replay.done"), ("relay", "deliveries.discard")):
            with pytest.raises(errors.InsufficientPrivilege, match="may write lines of the relay"):
                worker.execute("insert into dovecote.audit_log (actor, action) values (%s, %s)", (actor, action))
        for column in ("login", "at", "id"):
            with pytest.raises(errors.InsufficientPrivilege):
                worker.execute(
                    f"insert into dovecote.audit_log (actor, action, {column}) values ('relay', 'replay.done', null)"
                )
        # As relays of the release before do.
        worker.execute("insert into dovecote.audit_log (actor, action, affected) values ('relay', 'replay.done', 7)")

    assert lines(database) == [("relay", database.name("worker"), "replay.done", None, 7)]


def test_a_line_by_a_worker_is_never_in_somebody_else_s_name(
    database: Database, request: pytest.FixtureRequest
) -> None:
    with database.session() as admin:
        admin.execute("select setval('dovecote.outbox_position', 1)")
    with database.session("worker") as worker:
        worker.execute("select dovecote.recover('alice', 'framed')")
        worker.execute("select dovecote.recover('alice', 'nothing to do any more')")
    with database.session("operator") as operator:
        operator.execute("set default_transaction_isolation = 'repeatable read'")
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="READ COMMITTED"):
            operator.execute("select dovecote.recover('ada', 'why')")
        made = one(operator, "select dovecote.ensure_partitions(9)")

    name = database.name("worker")
    (recovered, partitions) = lines(database)
    assert recovered[:3] == (name, name, "sequence.recover")
    assert partitions == (*[database.name("operator")] * 2, "partitions.made", None, made)


# What only code knows -----------------------------------------------------------------------------------


@pytest.fixture
def led(database: Database) -> Database:
    """A relay has led with two handlers: one is ordered and may not act again; and once it had a third."""
    with database.session() as admin:
        admin.execute("update dovecote.relay_state set epoch = 7")
        admin.execute(
            "insert into dovecote.subscriptions (handler_name, event_type, since_position, routed_epoch, replayable,"
            " ordered)"
            " values ('test.note', %(type)s, (select max(position) from dovecote.outbox) - 2, 7, false, true),"
            " ('test.other', %(type)s, 0, 7, null, null), ('test.gone', %(type)s, 0, 6, true, false)",
            {"type": TYPE},
        )
        admin.execute(
            "insert into dovecote.processed_events (event_id, handler_name)"
            " select id, 'test.note' from dovecote.outbox order by position desc limit 1"
        )
    return database


def ask(session: Connection, handler: str, mode: str, **filter: Any) -> Any:
    return one(
        session,
        "select events from dovecote.start_replay('ada', 'why', %s, %s, %s, %s)",
        (handler, mode, Jsonb(filter), [TYPE]),
    )


def test_what_must_not_act_again_does_not_whatever_the_client_says(led: Database) -> None:
    with led.session("operator") as operator:
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match=r"test\.note may not process events again"):
            ask(operator, "test.note", "reprocess")
        with pytest.raises(errors.ObjectNotInPrerequisiteState, match="ask with --from-position"):
            ask(operator, "test.note", "backfill")
        with pytest.raises(errors.InvalidParameterValue, match=r"no handler 'test\.nobody'; there are test\."):
            ask(operator, "test.nobody", "backfill")
        with pytest.raises(errors.InvalidParameterValue, match="no handler"):
            operator.execute("select dovecote.pause_handler('ada', 'why', 'test.nobody')")

        assert ask(operator, "test.other", "backfill") == 10


def test_a_handler_that_has_a_route_is_not_treated_as_one_without(led: Database) -> None:
    without_route = "select affected from dovecote.discard_deliveries('ada', 'why', %s)"
    with led.session() as admin:
        admin.execute("insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
                      " event_type, state) select 'test.gone', id, position, 'price', '1', event_type, 'waiting'"
                      " from dovecote.outbox limit 1")  # fmt: skip
    with led.session("operator") as operator:
        for filter in ({"handler": "test.note", "without_route": True}, {"without_route": True}):
            with pytest.raises(errors.ObjectNotInPrerequisiteState, match="has a route in the relay that leads"):
                operator.execute(without_route, (Jsonb(filter),))
        with pytest.raises(errors.InvalidParameterValue, match="has a route in the relay that leads"):
            operator.execute("select dovecote.unsubscribe_handler('test.note', 'ada')")
        gone = Jsonb({"handler": "test.gone", "without_route": True, "state": "waiting"})

        assert one(operator, without_route, (gone,)) == 1
        assert one(operator, "select dovecote.unsubscribe_handler('test.gone', 'ada')") == 1
    assert [line[2:] for line in lines(led)] == [
        ("deliveries.discard", "why", 1),
        ("handlers.unsubscribe", None, 1),
    ]


# The commands, with nothing but the role ------------------------------------------------------------------


def test_who_lacks_the_role_is_refused_by_name(database: Database) -> None:
    worker, operator = connect(database.url_of("worker")), connect(database.url_of("operator"))
    refused = f"login {database.name('worker')} may not do this: grant dovecote_operator to it"
    try:
        with pytest.raises(operations.validation.NotPermitted, match=refused):
            operations.deliveries.retry(worker, DeliverySelection(), actor="ada")
        with pytest.raises(operations.validation.NotPermitted, match=refused):
            operations.handlers.pause(worker, [a_route(HANDLER)], HANDLER, actor="ada", reason="why")
        assert operations.deliveries.retry(operator, DeliverySelection(), actor="ada", dry_run=True).affected == 4
    finally:
        worker.dispose()
        operator.dispose()

    assert lines(database) == []


@pytest.mark.once
def test_relay_and_consumers_need_no_more_than_the_worker_s_role(
    fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    """Retries, deaths, order, replays, a pause: with nothing but the narrowed rights of the engine's role."""
    broken = {2: True}

    def act(event: Any, uow: Any, _: Any) -> None:
        if broken.get(int(event.price)):
            raise ValueError("not yet")
        uow.session.execute(effect, {"id": event.event_id, "price": int(event.price)})

    effect = text(
        "insert into dovecote.effects (handler, event_id, symbol, price) values ('test.note', :id, 'EUR', :price)"
    )
    route = a_route(HANDLER, act, ordered=True, max_attempts=2, replayable=True)
    with logins_in(fresh_database_url) as database:
        settings = settings_for(database.url_of("worker"), servers.redis_url, tmp_path)
        with system_for(settings, [route]) as system:
            admin, operator = connect(fresh_database_url), connect(database.url_of("operator"))
            try:
                make_room_for_effects(admin)
                with database.session() as session:
                    session.execute(
                        f"grant all on dovecote.effects, dovecote.effects_n_seq to {database.name('worker')}"
                    )
                _go_through_it_all(system, database, admin, operator, [route], broken)
            finally:
                admin.dispose()
                operator.dispose()


def _go_through_it_all(
    system: System, database: Database, admin: Engine, operator: Engine, routes: list[Route], broken: dict[int, bool]
) -> None:
    def status() -> operations.status.HandlerStatus:
        return operations.status.get_status(admin, routes).handlers[HANDLER]

    with system.running():
        write_quotes(system, [1, 2, 3, 4])
        eventually(lambda: (status().dead, status().waiting) == (1, 2), 20, "a dead one and two behind it")
        broken.clear()
        operations.deliveries.retry(operator, DeliverySelection(handler=HANDLER), actor="ada")
        system.until_quiet()
        asked = replays.Request(handler=HANDLER, mode="reprocess", filter=ReplaySelection(), reason="why", actor="ada")
        id = replays.start(operator, routes, asked).replay_id
        assert id is not None
        eventually(lambda: replays.get_replay(admin, id).state == "done", 20, "the end of the replay")
        operations.handlers.pause(operator, routes, HANDLER, actor="ada", reason="why")
        write_quotes(system, [5])
        operations.handlers.resume(operator, routes, HANDLER, actor="ada")
        system.until_quiet()
        with database.session() as session:
            allowed = session.execute("select distinct replayable, ordered from dovecote.subscriptions").fetchall()

    assert [effect.price for effect in effects_in(admin)] == [1, 2, 3, 4, 1, 2, 3, 4, 5]
    assert allowed == [(True, True)]
    worker, by_hand = database.name("worker"), database.name("operator")
    assert [(line[0], line[1], line[2]) for line in lines(database)] == [
        ("ada", by_hand, "deliveries.retry"),
        ("ada", by_hand, "replay.start"),
        ("relay", worker, "replay.done"),
        ("ada", by_hand, "handlers.pause"),
        ("ada", by_hand, "handlers.resume"),
    ]
