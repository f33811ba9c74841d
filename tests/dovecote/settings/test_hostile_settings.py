"""Whatever a DBA has set for our role or database: events are acted on, retried, replayed and shown all the same."""

import time
from functools import partial

import psycopg
import pytest
from sqlalchemy import make_url, text
from structlog.testing import capture_logs
from structlog.typing import EventDict

from domain.pricing import PriceQuoted
from dovecote import operations
from dovecote.operations import doctor
from dovecote.operations.replay_plans import Request
from dovecote.operations.replays import start
from dovecote.settings import Settings
from dovecote.store import connections
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import eventually
from tests.support.quotes import a_quote
from tests.support.system import system_for
from workers.gateways import Gateways

pytestmark = pytest.mark.servers

# Each is what somebody has in production: a time-out against forgotten sessions, or a style of another program.
HOSTILE = [
    "idle_session_timeout = '1s'",
    "idle_in_transaction_session_timeout = '50ms'",
    "transaction_timeout = '100ms'",
    "statement_timeout = '100ms'",
    "lock_timeout = '1ms'",
    "intervalstyle = 'iso_8601'",
    "intervalstyle = 'sql_standard'",
    "datestyle = 'German, DMY'",
    "datestyle = 'SQL, DMY'",
    "datestyle = 'Postgres, DMY'",
    "timezone = 'Asia/Kathmandu'",
    "client_encoding = 'LATIN1'",
    "client_encoding = 'SQL_ASCII'",
    "bytea_output = 'escape'",
    "extra_float_digits = -15",
    "standard_conforming_strings = off",
    "array_nulls = off",
    "default_transaction_isolation = 'repeatable read'",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_deferrable = on",
    "synchronous_commit = off",
    "enable_indexscan = off",
    "plan_cache_mode = 'force_generic_plan'",
]


def let(settings: Settings, setting: str) -> None:
    """Change what every new session of the database begins with; skip where this Postgres does not know it."""
    url = make_url(settings.database.url.get_secret_value())
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
        name = setting.partition(" ")[0]
        if connection.execute("select from pg_settings where lower(name) = %s", (name,)).fetchone() is None:
            pytest.skip(f"this Postgres has no {name}")
        connection.execute(f'alter database "{url.database}" set {setting}'.encode())


@pytest.mark.parametrize("setting", HOSTILE)
def test_the_whole_circle_under(setting: str, settings: Settings) -> None:
    fails = {"times": 4}

    def act(quote: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        if quote.price == 0 and fails["times"]:
            fails["times"] -= 1
            raise RuntimeError("four times")
        time.sleep(0.15 if quote.price == 1 else 0)  # longer than a transaction may be
        note_as("test.note", quote, uow)

    route = a_route(function=act, ordered=True, replayable=True)
    let(settings, setting)
    with system_for(settings, [route]) as system:
        make_room_for_effects(system.engine)
        with system.running():
            write_quotes(system, range(4), symbol="Zürich €")
            system.until_quiet()
            effects = effects_in(system.engine)
            assert [one.price for one in effects] == [0, 1, 2, 3]
            assert {one.symbol for one in effects} == {"Zürich €"}

            asked = Request(handler="test.note", mode="reprocess", reason="a test", actor="me")
            start(system.engine, [route], asked)
            eventually(lambda: len(effects_in(system.engine)) == 8, 15, "the effects of a replay")

            stands = system.status().handlers["test.note"]
            assert (stands.processed, stands.unprocessed, stands.dead) == (4, 0, 0)
            assert operations.status.get_status(system.engine, [route]).relay.epoch == 1, "no leadership was lost"
            findings = {one.check: one for one in doctor.examine(settings, [route]).findings}
            assert findings["relay.alive"].level == findings["postgres.schema"].level == "ok"


def test_a_silence_costs_neither_a_leadership_nor_a_writer_s_unit_of_work(settings: Settings) -> None:
    let(settings, "idle_session_timeout = '500ms'")
    writers = sessions_for(connect(settings.database.url.get_secret_value()))
    with system_for(settings, [a_route()]) as system:
        make_room_for_effects(system.engine)
        with system.running():
            for price in range(3):
                with unit_of_work(writers) as uow:
                    uow.emit(a_quote(price=price))
                system.until_quiet()
                time.sleep(0.8)  # the silence itself

            assert operations.status.get_status(system.engine, system.routes).relay.epoch == 1
            assert [one.price for one in effects_in(system.engine)] == [0, 1, 2]


def end_sessions_named(settings: Settings, name: str) -> None:
    with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as connection:
        ended = connection.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and application_name = %s",
            (name,),
        )
        assert ended.rowcount > 0


def test_a_connection_that_ended_while_it_was_idle_is_replaced_before_anybody_has_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_PING_AFTER_SECONDS", 0.05)
    engine = connect(settings.database.url.get_secret_value(), application_name="idle writer")
    writers = sessions_for(engine)
    with unit_of_work(writers) as uow:
        uow.session.execute(text("select"))

    end_sessions_named(settings, "idle writer")
    time.sleep(0.1)  # idle for longer than that
    with unit_of_work(writers) as uow:
        uow.emit(a_quote())

    with engine.connect() as connection:
        assert connection.scalar(text("select count(*) from dovecote.outbox")) == 1
    engine.dispose()


def test_a_transaction_timeout_that_a_handler_sets_is_its_failure_and_no_outage(settings: Settings) -> None:
    let(settings, "transaction_timeout = 0")  # skips where there is none

    def act(quote: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        uow.session.execute(text("set local transaction_timeout = '20ms'"))
        uow.session.execute(text("select pg_sleep(1)"))

    with system_for(settings, [a_route(function=act, max_attempts=3)]) as system, system.running():
        write_quotes(system, [1])

        eventually(lambda: system.status().handlers["test.note"].dead == 1, 20, "a dead event")


def test_a_record_that_cannot_be_written_is_held_and_says_why(settings: Settings) -> None:
    def run(statement: str) -> None:
        with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def says(logged: list[EventDict], words: str) -> bool:
        return any(words in line["event"] for line in logged)

    fails = {"times": 2}

    def act(quote: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        if fails["times"]:
            fails["times"] -= 1
            raise RuntimeError("twice")
        note_as("test.note", quote, uow)

    with system_for(settings, [a_route(function=act)]) as system:
        make_room_for_effects(system.engine)
        with system.relay(), capture_logs() as logged:
            write_quotes(system, [1])
            eventually(lambda: system.status().relay.lag_events == 0, 10, "a message")
            run("alter table dovecote.deliveries rename column error to reason")
            with system.workers():
                eventually(partial(says, logged, "this does not pass by itself"), 10, "a sentence")
                assert not says(logged, "waiting for postgres")
                run("alter table dovecote.deliveries rename column reason to error")
                system.until_quiet()
    assert len(effects_in(system.engine)) == 1
