"""The doctor finds what is wrong by trying; each test breaks one thing for real."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from dramatiq.common import current_millis
from sqlalchemy import text
from typer.testing import CliRunner

from dovecote import operations
from dovecote.cli import app
from dovecote.migrations import schema
from dovecote.operations import doctor
from dovecote.operations.deliveries import DeliverySelection
from dovecote.operations.doctor import flow, postgres
from dovecote.operations.doctor import redis as redis_checks
from dovecote.operations.doctor.finding import Finding
from dovecote.settings import Settings
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, make_room_for_effects, write_quotes
from tests.support.migrations import LOCATIONS
from tests.support.pooling import PGBOUNCER, pooled_url
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers


@pytest.fixture
def system(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """A system whose relay does not run yet."""
    monkeypatch.setattr(flow, "_SECOND_CHECK_SECONDS", 0.2)
    monkeypatch.setattr(postgres, "_HEARD_WITHIN_SECONDS", 1.0)
    with system_for(settings, (a_route(),)) as system:
        make_room_for_effects(system.engine)
        yield system


def examined(system: System, **more: Any) -> dict[str, Finding]:
    found = doctor.examine(system.settings, system.routes, **more)
    assert all(finding.advice for finding in found.findings if finding.level != "ok"), "each says what to do"
    return {finding.check: finding for finding in found.findings}


def levels(system: System, **more: Any) -> dict[str, str]:
    return {check: finding.level for check, finding in examined(system, **more).items()}


def run(system: System, query: str) -> None:
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        connection.execute(query)


def redis_of(system: System) -> Any:
    return system.broker.client


@contextmanager
def redis_with(system: System, option: str, value: str) -> Iterator[None]:
    client = redis_of(system)
    before = client.config_get(option)[option]
    client.config_set(option, value)
    try:
        yield
    finally:
        client.config_set(option, before)


def a_closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_system_that_is_well_has_no_error(system: System) -> None:
    with redis_with(system, "appendonly", "yes"), system.running():
        write_quotes(system, [1, 2, 3])
        system.until_quiet()
        found = examined(system)

    # Tests share one Redis database, and everybody may connect to theirs in Postgres; that is all that is amiss.
    amiss = {"redis.own_database", "rights.public"}
    assert {check for check, finding in found.items() if finding.level != "ok"} <= amiss, found
    assert "leads since" in found["relay.alive"].found


def test_servers_that_are_down_are_findings_and_the_command_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOVECOTE_HOME", str(tmp_path))
    monkeypatch.setenv("DATABASE_URL", f"postgresql://me:hunter2@127.0.0.1:{a_closed_port()}/mine")
    monkeypatch.setenv("REDIS_URL", f"redis://:hunter2@127.0.0.1:{a_closed_port()}/0")

    done = CliRunner().invoke(app, ["doctor", "--json"])

    assert done.exit_code == 1
    findings = json.loads(done.stdout)["findings"]
    assert [(one["check"], one["level"]) for one in findings] == [
        ("postgres.reachable", "error"),
        ("redis.reachable", "error"),
    ]
    assert all(set(one) == {"check", "level", "found", "advice"} and one["advice"] for one in findings)
    assert "hunter2" not in done.output


def test_one_server_down_does_not_keep_the_other_from_being_examined(system: System, tmp_path: Path) -> None:
    url = system.settings.database.url.get_secret_value()
    halved = settings_for(url, f"redis://127.0.0.1:{a_closed_port()}/0", tmp_path)

    found = {finding.check: finding.level for finding in doctor.examine(halved, system.routes).findings}

    assert found["redis.reachable"] == "error"
    assert found["postgres.schema"] == "ok"


@pytest.mark.once
def test_a_server_that_takes_connections_and_never_answers_hangs_nobody(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        settings = settings_for(f"postgresql://me@127.0.0.1:{port}/x", f"redis://127.0.0.1:{port}/0", tmp_path)
        began = time.monotonic()

        found = doctor.examine(settings, (a_route(),), limit_seconds=1.0)

        assert time.monotonic() - began < 5
    assert {finding.check for finding in found.findings} == {"postgres.answers", "redis.answers", "queues.answers"}
    assert found.has_errors


def test_versions_that_are_too_old_are_errors(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_OLDEST_POSTGRES", 990_000)
    monkeypatch.setattr(redis_checks, "_OLDEST_REDIS", (99, 0))

    found = levels(system)

    assert found["postgres.version"] == found["redis.version"] == "error"


def test_a_schema_that_is_missing_or_old_is_an_error(empty_database_url: str, servers: Servers, tmp_path: Path) -> None:
    settings = settings_for(empty_database_url, servers.redis_url, tmp_path)
    for revision in (None, "dovecote_0004"):
        if revision:
            schema.upgrade(empty_database_url, revision, locations=LOCATIONS)

        found = {finding.check: finding for finding in doctor.examine(settings, (a_route(),)).findings}

        assert found["postgres.schema"].level == "error"
        assert "dovecote migrate" in found["postgres.schema"].advice


@pytest.mark.once
@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)")
def test_a_pool_of_transactions_is_found_out(system: System, tmp_path: Path) -> None:
    with pooled_url(system.settings.database.url.get_secret_value()) as url:
        settings = settings_for(url, system.settings.redis.url.get_secret_value(), tmp_path)

        found = {finding.check: finding for finding in doctor.examine(settings, system.routes).findings}

    assert found["postgres.session_locks"].level == "error"
    assert found["postgres.listen"].level == "error"
    assert "pgbouncer" in found["postgres.listen"].advice
    assert found["postgres.schema"].level == "ok", "the rest is examined all the same"


@pytest.mark.once
@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)")
def test_a_pool_that_refuses_our_connections_is_not_taken_for_an_old_schema(system: System, tmp_path: Path) -> None:
    with pooled_url(system.settings.database.url.get_secret_value(), takes_options=False) as url:
        settings = settings_for(url, system.settings.redis.url.get_secret_value(), tmp_path)

        found = {finding.check: finding for finding in doctor.examine(settings, system.routes).findings}

    assert found["postgres.options"].level == "error"
    assert "ignore_startup_parameters" in found["postgres.options"].advice


def test_a_redis_that_forgets_or_throws_away_is_found(system: System) -> None:
    with redis_with(system, "appendonly", "no"), redis_with(system, "maxmemory-policy", "allkeys-lru"):
        found = levels(system)

    assert found["redis.append_only"] == "warning"
    assert found["redis.eviction"] == "error"


def test_keys_of_somebody_else_are_found(system: System) -> None:
    key = f"somebody:else:{system.settings.redis.namespace}"
    redis_of(system).set(key, "1", ex=60)
    try:
        assert levels(system)["redis.own_database"] == "warning"
    finally:
        redis_of(system).delete(key)


@pytest.mark.parametrize(("seconds", "level"), [(90, "error"), (-5.5, "error"), (2, "warning"), (0, "ok")])
def test_clocks_that_differ_are_found(system: System, seconds: float, level: str) -> None:
    found = levels(system, now=lambda: time.time() + seconds)

    assert found["postgres.clock"] == found["redis.clock"] == level


def test_partitions_that_end_soon_or_were_missed_are_found(system: System) -> None:
    assert levels(system)["postgres.partitions"] == "ok"
    run(
        system,
        """
        do $$ declare part text; begin
            for part in select inhrelid::regclass::text from pg_inherits
                        where inhparent in ('dovecote.outbox'::regclass, 'dovecote.processed_events'::regclass)
                          and inhrelid::regclass::text !~ 'default'
            loop execute 'drop table ' || part; end loop;
        end $$
        """,
    )
    assert levels(system)["postgres.partitions"] == "error"

    write_quotes(system, [1])

    assert "outbox_default" in examined(system)["postgres.partitions"].found


def test_a_system_without_a_relay_is_found(system: System) -> None:
    assert examined(system)["relay.alive"].found == "no relay leads"


def test_a_relay_that_holds_its_lock_and_does_nothing_is_found(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_SILENT_SECONDS", -2 * system.settings.relay.poll_interval_seconds + 0.3)
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as frozen:
        frozen.execute("begin; lock table dovecote.relay_leader in share update exclusive mode")
        time.sleep(0.5)  # as long as it must have been silent

        assert "it has asked nothing for" in examined(system)["relay.alive"].found


def test_the_oldest_writer_is_shown_with_who_it_is(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(system)["relay.writers"].found == "no transaction is writing events"
    monkeypatch.setattr(postgres, "_LONG_WRITER_SECONDS", 0.0)
    with psycopg.connect(
        system.settings.database.url.get_secret_value(), application_name="the writer of a test"
    ) as writer:
        writer.execute("select dovecote.append_event('price', 'EUR', 'pricing.price_quoted.v1', '{}')")

        finding = examined(system)["relay.writers"]

        assert finding.level == "warning"
        assert f"pid {writer.info.backend_pid} (login {writer.info.user}, the writer of a test)" in finding.found
        assert "append_event" in finding.found
        assert f"pg_terminate_backend({writer.info.backend_pid})" in finding.advice


def test_a_queue_that_nobody_serves_is_found(system: System) -> None:
    with system.relay():
        write_quotes(system, [1])
        eventually(lambda: redis_of(system).llen(f"{system.settings.redis.namespace}:test"), 10, "a message")
        assert levels(system)["queues.served"] == "error"

        with system.workers():
            system.until_quiet()
            assert levels(system)["queues.served"] == "ok"


def test_what_a_dead_worker_left_is_found(system: System) -> None:
    with system.relay():
        write_quotes(system, [1])
        eventually(lambda: redis_of(system).llen(f"{system.settings.redis.namespace}:test"), 10, "a message")
    assert system.broker.do_fetch("test", 1)
    assert levels(system)["queues.dead_workers"] == "ok", "it is alive so far"

    long_ago = current_millis() - 10 * system.settings.consumers.heartbeat_timeout_ms
    heartbeats = f"{system.settings.redis.namespace}:__heartbeats__"
    redis_of(system).zadd(heartbeats, {system.broker.broker_id: long_ago})

    finding = examined(system)["queues.dead_workers"]
    assert finding.level == "warning"
    assert f"1 of test by {system.broker.broker_id}" in finding.found


def test_queues_of_no_route_are_found_with_whose_messages_lie_there(system: System) -> None:
    prefix = f"{system.settings.redis.namespace}:"
    for id, handler in enumerate(["test.note", "test.note", "gone.handler"]):
        message = orjson.dumps({"queue_name": "renamed", "actor_name": handler})
        redis_of(system).hset(f"{prefix}renamed.msgs", str(id), message)
    redis_of(system).hset(f"{prefix}foreign.msgs", "1", "a message")
    redis_of(system).rpush(f"{prefix}test.held.gone.handler", "1", "2")

    finding = examined(system)["queues.known"]

    assert "renamed (3: 2 of test.note, whose queue is test today, 1 of gone.handler)" in finding.found
    assert "foreign (1: 1 of somebody else)" in finding.found
    assert "test (2 held for gone.handler, which no route has)" in finding.found
    assert "The relay that leads moves" in finding.advice
    assert "replay start --mode backfill" in finding.advice


def test_queues_of_our_own_handlers_are_never_to_be_deleted(system: System) -> None:
    message = '{"queue_name":"renamed","actor_name":"test.note",'
    redis_of(system).hset(f"{system.settings.redis.namespace}:renamed.msgs", "1", message)

    assert "delete" not in examined(system)["queues.known"].advice


def test_dead_messages_are_found_with_their_events(system: System) -> None:
    with system.relay():
        write_quotes(system, [1])
        eventually(lambda: redis_of(system).llen(f"{system.settings.redis.namespace}:test"), 10, "a message")
    (message,) = system.broker.do_fetch("test", 1)
    system.broker.do_nack("test", orjson.loads(message)["message_id"])
    with system.engine.connect() as connection:
        event_id = connection.execute(text("select id from dovecote.outbox")).scalar_one()

    finding = examined(system)["queues.dead_letters"]

    assert finding.level == "warning"
    assert f"test (1, of test.note, with events such as {event_id})" in finding.found
    assert "replay start --handler HANDLER --mode backfill" in finding.advice


def test_what_is_left_of_handlers_and_of_events_that_are_gone_is_found(system: System) -> None:
    found = examined(system)
    assert (found["handlers.known"].level, found["deliveries.events"].level) == ("ok", "ok")
    write_quotes(system, [1, 2])
    for handler in ("gone.handler", "test.note"):
        run(
            system,
            "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
            f" event_type, state, next_attempt_at) select '{handler}', id, position, aggregate_type, aggregate_id,"
            " event_type, 'retrying', now() from dovecote.outbox",
        )
    run(system, "delete from dovecote.outbox where position = 2")
    with system.relay():
        dead = "select count(*) from dovecote.deliveries where state = 'dead'"
        with system.engine.connect() as connection:
            eventually(lambda: connection.execute(text(dead)).scalar_one(), 10, "the relay has seen it")

    found = examined(system)
    assert "gone.handler (2 waiting, 0 dead, 0 subscriptions)" in found["handlers.known"].found
    assert "1 deliveries whose event is not in the outbox: test.note" in found["deliveries.events"].found
    (left,) = operations.handlers.list_handlers_without_route(system.engine, system.routes)
    assert (left.name, left.retrying, left.at_least) == ("gone.handler", 2, [])

    # As the advice says.
    given_up = DeliverySelection(handler="gone.handler", state="retrying")
    change = operations.deliveries.discard(system.engine, given_up, actor="ada", reason="gone", routes=system.routes)
    assert change.affected == 2


def test_events_without_routes_and_routes_without_events_are_found(system: System) -> None:
    found = examined(system)
    assert (found["routes.events"].level, found["routes.handlers"].level) == ("ok", "ok")

    run(system, "select dovecote.append_event('ghost', 'g1', 'haunting.ghost_seen.v1', '{}')")

    found = examined(system)
    assert "haunting.ghost_seen.v1 (1)" in found["routes.events"].found
    assert "test.note" in found["routes.handlers"].found
