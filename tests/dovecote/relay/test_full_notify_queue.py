"""A full queue of notifications costs wake-ups and nothing else: no writer, consumer or operator fails for it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow
from structlog.testing import capture_logs

from domain.pricing import PriceQuoted
from dovecote.local.servers import servers
from dovecote.operations import doctor
from dovecote.operations.deliveries import DeliverySelection, retry
from dovecote.operations.handlers import pause, resume
from dovecote.operations.replay_plans import Request
from dovecote.operations.replays import start
from dovecote.relay import leader as leading
from dovecote.settings import Settings
from dovecote.unit_of_work import UnitOfWork
from tests.conftest import settings_for
from tests.support.clusters import put_cluster
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import a_place_for_servers, eventually
from tests.support.system import System, system_for
from workers.gateways import Gateways

pytestmark = pytest.mark.servers

# The least there is: 512 kB instead of 8 GB.
_PAGES = "64"


@pytest.fixture(scope="module")
def small_queue() -> Iterator[tuple[str, str]]:
    """The URLs of a Postgres whose queue of notifications is soon full, and of a Redis."""
    with a_place_for_servers() as place:
        put_cluster(place / "postgres")
        with (
            servers(place, postgres_settings={"fsync": "off"}) as (postgres, redis),
            psycopg.connect(postgres.url, autocommit=True) as connection,
        ):
            if connection.info.server_version < 170_000:
                pytest.skip("max_notify_queue_pages is of Postgres 17: before, the queue has 8 GB")
            connection.execute(f"alter system set max_notify_queue_pages = {_PAGES}".encode())
        with servers(place, postgres_settings={"fsync": "off"}) as (postgres, redis):
            yield postgres.url, redis.url


@pytest.fixture
def system(small_queue: tuple[str, str], tmp_path: Path) -> Iterator[System]:
    settings = settings_for(*small_queue, tmp_path)
    fails = {"once": True}

    def act(quote: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        if quote.price == 0 and fails.pop("once", False):
            raise RuntimeError("once")
        note_as("test.note", quote, uow)

    route = a_route(function=act, ordered=True, replayable=True, bundle_size=1, backoff_seconds=0.2)
    with system_for(settings, [route]) as system:
        run(
            settings,
            "truncate dovecote.outbox, dovecote.processed_events, dovecote.deliveries; drop table if exists effects",
        )
        make_room_for_effects(system.engine)
        yield system


def run(settings: Settings, statement: str) -> None:
    with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as connection:
        connection.execute(statement.encode())


def usage(settings: Settings) -> float:
    with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as connection:
        (used,) = connection.execute("select pg_notification_queue_usage()").fetchone() or (0.0,)
    return float(used)


@contextmanager
def a_full_queue(settings: Settings) -> Iterator[None]:
    """Somebody listens and stays in a transaction, and another application notifies until it is refused."""
    url = settings.database.url.get_secret_value()
    with psycopg.connect(url, autocommit=True, application_name="forgotten listener") as listener:
        listener.execute("listen somebody_elses_channel")
        listener.execute("begin")
        listener.execute("select 1")
        usage(settings)  # frees what everybody else has read: it is full for good then
        with psycopg.connect(url, autocommit=True) as other:
            for length in (7_000, 10):  # the last page, too
                fill(other, length)
        yield


def fill(connection: psycopg.Connection[TupleRow], length: int) -> None:
    with suppress(psycopg.errors.ProgramLimitExceeded):
        while True:
            connection.execute(
                "select pg_notify('somebody_elses_channel', repeat('x', %s) || clock_timestamp())", (length,)
            )


def is_asleep(system: System) -> bool:
    query = """
        select from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and granted
          and (classid::bigint << 32 | objid::bigint) = dovecote.wakeup_key()
    """
    with psycopg.connect(system.settings.database.url.get_secret_value()) as connection:
        return connection.execute(query).fetchone() is not None


def test_everybody_is_taken_while_the_queue_is_full(system: System) -> None:
    with system.running():
        write_quotes(system, [100])
        system.until_quiet()
        with a_full_queue(system.settings):
            for price in range(20):
                eventually(lambda: is_asleep(system), 10, "a relay that would have to be woken")
                write_quotes(system, [price])
            # The consumer's retry and its releases are among it: a bundle a second, here an event, as the relay polls.
            system.until_quiet(60)
            prices = [one.price for one in effects_in(system.engine)]
            assert prices == [100, *range(20)]

            # Operators' verbs.
            pause(system.engine, system.routes, "test.note", actor="me", reason="a test")
            resume(system.engine, system.routes, "test.note", actor="me")
            asked = Request(handler="test.note", mode="reprocess", reason="a test", actor="me")
            start(system.engine, system.routes, asked)
            eventually(lambda: len(effects_in(system.engine)) == 42, 20, "the effects of a replay")


def test_an_operator_s_retry_is_taken(system: System) -> None:
    write_quotes(system, [1])
    run(
        system.settings,
        "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type,"
        " state) select 'test.note', id, position, aggregate_type, aggregate_id, event_type, 'dead'"
        " from dovecote.outbox",
    )
    with system.running():
        eventually(lambda: is_asleep(system), 10, "a relay")
        with a_full_queue(system.settings):
            done = retry(system.engine, DeliverySelection(state="dead"), actor="me", routes=system.routes)
            assert done.affected == 1
            system.until_quiet()


def test_a_relay_starts_while_the_queue_is_full_and_doctor_says_who_holds_it(system: System) -> None:
    with a_full_queue(system.settings):
        with capture_logs() as logged, system.running():
            write_quotes(system, [1])
            system.until_quiet()
            found = {one.check: one for one in doctor.examine(system.settings, system.routes).findings}
        assert any("NOTIFY fails" in line["event"] for line in logged)

    assert found["postgres.reachable"].level == "ok"
    assert found["postgres.listen"].level == "warning"
    queue = found["postgres.notify_queue"]
    assert queue.level == "error"
    assert "forgotten listener" in queue.found
    assert "pg_terminate_backend" in queue.advice


def test_the_relay_frees_the_queue_when_its_cause_is_gone(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "_FREE_NOTIFICATIONS_SECONDS", 0.1)

    def can_notify() -> bool:
        # It asks for nothing first: that alone would free the queue.
        try:
            run(system.settings, "notify somebody_elses_channel")
        except psycopg.errors.ProgramLimitExceeded:
            return False
        return True

    with a_full_queue(system.settings):
        assert usage(system.settings) > 0.9
    assert not can_notify(), "nobody frees it by himself"

    with system.relay():
        eventually(can_notify, 10, "a queue with room")
    assert usage(system.settings) < 0.1
