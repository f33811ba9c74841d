"""A snapshot or a transaction that somebody holds keeps neither relay nor Postgres busy, and no event waits for it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from dovecote.store import published_batches
from dovecote.telemetry.instrumentation import RelayInstrumentation
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, make_room_for_effects, write_quotes
from tests.support.outbox_rows import Connection, insert
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

SystemWith = Callable[..., System]
Opened = Callable[[], Connection]


@pytest.fixture
def system_with(url: str, servers: Servers, tmp_path: Path) -> Iterator[SystemWith]:
    with ExitStack() as stack:

        def build(**settings: object) -> System:
            variables = {f"DOVECOTE_{name}": str(value) for name, value in settings.items()}
            settings_ = settings_for(url, servers.redis_url, tmp_path, **variables)
            system = stack.enter_context(system_for(settings_, [a_route()]))
            make_room_for_effects(system.engine)
            return system

        yield build


def asked(system: System, query: str) -> Any:
    with system.engine.connect() as connection:
        return connection.scalar(text(query))


def published(system: System) -> int:
    found: int = asked(system, "select coalesce(sum(events), 0) from dovecote.published_batches")
    return found


def has_published(system: System, events: int) -> bool:
    return published(system) == events


def versions(system: System, table: str) -> int:
    """How many versions of rows the table has got so far; sessions report when they end, and now and then before."""
    found: int = asked(system, f"select n_tup_upd + n_tup_ins from pg_stat_user_tables where relname = '{table}'")
    return found


def is_asleep(system: System) -> bool:
    """Whether a relay holds the wake-up lock for itself."""
    held: bool = asked(
        system,
        """
        select exists (select from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and granted
          and (classid::bigint << 32 | objid::bigint) = dovecote.wakeup_key()
          and database = (select oid from pg_database where datname = current_database()))
        """,
    )
    return held


class WakeUps(RelayInstrumentation):
    """How often the relay was woken."""

    count = 0

    def rang(self) -> None:
        self.count += 1


def transactions_per_second(system: System, seconds: float) -> float:
    """What the database is asked meanwhile, our own questions included."""
    query = "select xact_commit from pg_stat_database where datname = current_database()"
    before, began = asked(system, query), time.monotonic()
    time.sleep(seconds)  # a span of time: what happens in it is counted
    return float(asked(system, query) - before) / (time.monotonic() - began)


# Versions of rows ---------------------------------------------------------------------------------


@pytest.mark.once
def test_a_batch_leaves_no_version_of_the_relay_s_row_nor_of_an_unrouted_type(
    system_with: SystemWith, opened: Opened
) -> None:
    system = system_with(RELAY__GATHER_MS=0)
    writer = opened()
    began = time.monotonic()
    with system.relay():
        for number in range(60):
            write_quotes(system, [number])
            with writer.transaction():
                writer.execute("select dovecote.append_event('price', 'EUR', 'testing.given_up.v1', '{}')")
            eventually(partial(has_published, system, 2 * number + 2), 10, "another batch")
    took = time.monotonic() - began

    assert asked(system, "select count(*) from dovecote.published_batches") >= 60
    assert asked(system, "select checkpoint from dovecote.relay_state") == 120
    (events,) = [kind.events for kind in system.status().unrouted]
    assert events == 60
    # One a second and one at the end; a leader's first three are its take-over.
    for table in ("relay_state", "unrouted_types"):
        eventually(partial(versions, system, table), 10, "sessions that reported what they did")
        assert versions(system, table) <= took + 6


@pytest.mark.once
def test_an_idle_relay_writes_nothing(system_with: SystemWith) -> None:
    system = system_with()
    where = "select ctid::text || ' ' || xmin::text from dovecote.relay_state"
    with system.relay():
        write_quotes(system, [1])
        eventually(lambda: asked(system, "select checkpoint from dovecote.relay_state") == 1, 10, "the checkpoint")
        before, seen_at = asked(system, where), asked(system, "select seen_at from dovecote.relay_state")

        time.sleep(2.5)  # two ticks and more, in which nothing may be written

        assert asked(system, where) == before
        assert asked(system, "select seen_at from dovecote.relay_state") == seen_at


@pytest.mark.once
def test_the_checkpoint_follows_within_a_second_while_the_relay_is_busy(
    system_with: SystemWith, opened: Opened
) -> None:
    system = system_with()
    writer = opened()
    with system.relay():
        for _ in range(3):
            began, before = time.monotonic(), asked(system, "select checkpoint from dovecote.relay_state")
            while asked(system, "select checkpoint from dovecote.relay_state") == before:
                assert time.monotonic() - began < 5, "no checkpoint in traffic"
                insert(writer)
                writer.commit()


def test_a_record_that_waits_for_a_take_over_is_refused(opened: Opened, relays: Connection) -> None:
    """The row is only locked, and it must be: a plain read would still see the old epoch."""
    next_leader = opened()
    next_leader.execute("update dovecote.relay_state set epoch = epoch + 1")
    with ThreadPoolExecutor() as elsewhere:
        given = {"epoch": 0, "positions": "{[1,2)}", "events": 1}
        record = elsewhere.submit(lambda: relays.execute(published_batches.RECORD, given).rowcount)
        try:
            waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
            with psycopg.connect(relays.info.dsn, password=relays.info.password, autocommit=True) as other:
                watched = (relays.info.backend_pid,)
                eventually(lambda: record.done() or other.execute(waits, watched).fetchone() == (True,), 10, "it waits")
        finally:
            next_leader.commit()

        assert record.result(10) == 0
    assert relays.execute("select count(*) from dovecote.published_batches").fetchone() == (0,)


# A writer that is held ----------------------------------------------------------------------------


@pytest.mark.once
def test_a_writer_that_sleeps_in_its_transaction_keeps_nobody_busy(system_with: SystemWith, opened: Opened) -> None:
    system = system_with()
    held = opened()
    with system.relay():
        eventually(lambda: is_asleep(system), 10, "a sleeping relay")
        write_quotes(system, range(5))
    insert(held)  # no relay sleeps, so it notifies none
    with system.relay():
        eventually(lambda: is_asleep(system), 10, "a relay that sleeps beside the writer")
        time.sleep(3)  # what it has taken so far decides how often is looked

        assert transactions_per_second(system, 4) < 30


@pytest.mark.once
def test_an_event_beside_a_writer_that_sleeps_is_sent_at_once(system_with: SystemWith, opened: Opened) -> None:
    system = system_with(RELAY__POLL_INTERVAL_SECONDS=60)
    held, other, wake_ups = opened(), opened(), WakeUps()
    insert(held)
    with system.relay(wake_ups):
        for number in range(1, 6):
            eventually(lambda: is_asleep(system), 10, "a relay that sleeps beside the writer")
            insert(other)
            other.commit()
            eventually(partial(has_published, system, number), 10, "the event")

    # Beside the writer it also looks by itself, and may be awake just then.
    assert wake_ups.count >= 3


@pytest.mark.once
def test_what_a_writer_commits_that_was_active_when_the_relay_fell_asleep_is_found_soon(
    system_with: SystemWith, opened: Opened
) -> None:
    system = system_with(RELAY__POLL_INTERVAL_SECONDS=60)
    silent = opened()
    insert(silent)
    with system.relay():
        eventually(lambda: is_asleep(system), 10, "a relay that sleeps beside the writer")
        time.sleep(1)  # how long it has been active decides how soon it is found

        silent.commit()

        eventually(lambda: published(system) == 1, 2, "the event without a notification")


@pytest.mark.once
def test_a_relay_sleeps_for_its_whole_poll_once_the_last_silent_writer_is_over(
    system_with: SystemWith, opened: Opened
) -> None:
    system = system_with(RELAY__POLL_INTERVAL_SECONDS=60)
    silent = opened()
    insert(silent)
    with system.relay():
        eventually(lambda: is_asleep(system), 10, "a relay that sleeps beside the writer")

        silent.rollback()
        time.sleep(1)  # the look that finds it over is not to be counted

        # What it does once a second, and our own questions.
        assert transactions_per_second(system, 3) < 12


def test_a_writer_keeps_no_lock_that_a_relay_must_have_to_sleep_and_notifies_once_it_sleeps(
    opened: Opened, relays: Connection
) -> None:
    in_flight, another = opened(), opened()

    insert(in_flight)

    assert relays.execute("select pg_try_advisory_lock(dovecote.wakeup_key())").fetchone() == (True,)
    relays.execute("listen dovecote_outbox")
    insert(another)
    another.commit()
    assert [heard.channel for heard in relays.notifies(timeout=5, stop_after=1)] == ["dovecote_outbox"]
