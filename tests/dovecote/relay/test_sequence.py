"""The sequence of positions is set back, or hands out blocks: nobody leads until it is repaired; nothing is lost."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest
from psycopg.rows import TupleRow
from typer.testing import CliRunner

from dovecote import operations
from dovecote.cli import app
from dovecote.errors import NewerRelay
from dovecote.exporter.collector import SystemCollector
from dovecote.operations.doctor.postgres import sequence as doctor_s_finding
from dovecote.operations.recover import CannotRecover, Recovery
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.store import sequence
from dovecote.store.reader import Reader
from dovecote.store.runs import outbox_run
from dovecote.store.sequence import SequenceFault, SequenceWatch
from dovecote.telemetry.instrumentation import RelayInstrumentation, RelayState
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.outbox_rows import insert
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

Connection = psycopg.Connection[TupleRow]


class States(RelayInstrumentation):
    """Remembers what the relay does now."""

    now: RelayState = "starting"

    def alive(self, state: RelayState) -> None:
        self.now = state

    def is_(self, state: RelayState) -> Callable[[], bool]:
        return lambda: self.now == state


@pytest.fixture(autouse=True)
def asks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "ASK_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(sequence, "_POLL_INTERVAL_SECONDS", 0.1)


@pytest.fixture
def database(settings: Settings) -> Iterator[Connection]:
    with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as connection:
        yield connection


@pytest.fixture
def states() -> States:
    return States()


@contextmanager
def in_flight(settings: Settings, states: States, routes: Sequence[Route]) -> Iterator[System]:
    with ExitStack() as stack:
        system = stack.enter_context(system_for(settings, routes))
        with system.engine.connect() as connection:
            (is_new,) = connection.exec_driver_sql("select to_regclass('effects') is null").one()
        if is_new:
            make_room_for_effects(system.engine)
        stack.enter_context(system.relay(states))
        stack.enter_context(system.workers())
        yield system


def recover(system: System, **more: Any) -> Recovery:
    return operations.recover.recover(system.engine, system.routes, actor="somebody", **more)


def of(handler: str, system: System) -> list[int]:
    return [effect.price for effect in effects_in(system.engine) if effect.handler == handler]


def metric(settings: Settings, name: str) -> float:
    (found,) = [one for one in SystemCollector(settings, ()).collect() if one.name == name]
    return float(found.samples[0].value)


def test_a_relay_refuses_a_sequence_that_is_behind_and_leads_once_it_is_recovered(
    settings: Settings, database: Connection, states: States
) -> None:
    with in_flight(settings, states, [a_route("test.old")]) as system:
        write_quotes(system, range(20))
        system.until_quiet()
    with in_flight(settings, states, [a_route("test.old"), a_route("test.new")]) as system:
        eventually(states.is_("leading"), 10, "the second handler subscribes at position 20")

        database.execute("select setval('dovecote.outbox_position', 1, false)")
        write_quotes(system, range(100, 105))
        eventually(states.is_("refuses"), 10, "the leader ends in a refusal")

        (fault,) = database.execute("select dovecote.sequence_fault()").fetchone() or ("",)
        assert fault.startswith(
            "the sequence dovecote.outbox_position is behind: it has handed out 5, and position 20 "
        )
        relay = system.status().relay
        assert (relay.fault, relay.leading, relay.lag_events, relay.at_least) == (fault, False, 5, ["lag_events"])
        finding = doctor_s_finding(database)
        assert (finding.level, finding.found) == ("error", fault)
        assert metric(settings, "dovecote_sequence_fault") == 1

        would = recover(system, dry_run=True)
        assert (would.changed, would.handed_out, would.continues_after, would.unread) == (False, 5, 20, 5)
        assert would.sent_again == {"test.old": 5, "test.new": 5}
        assert states.now == "refuses"
        done = recover(system, reason="restored")
        assert done.changed

        system.until_quiet()
        assert sorted(of("test.old", system)) == [*range(20), *range(100, 105)]
        assert of("test.new", system) == list(range(100, 105)), "in order, and nothing from before it subscribed"
        assert system.status().relay.fault is None
        assert metric(settings, "dovecote_sequence_fault") == 0
        (line,) = operations.audit.list_audit_entries(system.engine, action="sequence.recover").items
        assert (line.reason, line.affected, line.details["handed_out"]) == ("restored", 5, 5)

        again = recover(system)
        assert (again.fault, again.unread, again.changed) == (None, 0, False)
        assert len(operations.audit.list_audit_entries(system.engine, action="sequence").items) == 1


@pytest.mark.parametrize(
    "cure",
    ["select setval('dovecote.outbox_position', 21, false)", "alter sequence dovecote.outbox_position restart 21"],
)
def test_a_sequence_that_is_repaired_by_hand_hides_nothing_that_was_written_before(
    settings: Settings, database: Connection, states: States, cure: str
) -> None:
    with in_flight(settings, states, [a_route()]) as system:
        write_quotes(system, range(20))
        system.until_quiet()
        database.execute("select setval('dovecote.outbox_position', 3)")
        write_quotes(system, range(100, 105))
        eventually(states.is_("refuses"), 10, "the leader ends in a refusal")

        database.execute(cure)

        eventually(states.is_("leading"), 10, "it leads by itself")
        system.until_quiet()
        assert sorted(of("test.note", system)) == [*range(20), *range(100, 105)]
        audited = database.execute("select actor, affected from dovecote.audit_log where action = 'sequence.recover'")
        assert audited.fetchall() == [("relay", 5)]


def test_a_leader_ends_where_its_messages_would_all_be_looked_up(
    database: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "_POLL_INTERVAL_SECONDS", 0.0)
    watch = SequenceWatch(database, 0, outbox_run(database))
    watch.look()

    database.execute("vacuum full dovecote.relay_state")

    with pytest.raises(NewerRelay, match="is now"):
        watch.look()


def test_a_leader_ends_where_the_sequence_was_recovered_under_another_epoch(
    relays: psycopg.Connection[TupleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "_POLL_INTERVAL_SECONDS", 0.0)
    watch = SequenceWatch(relays, 0, outbox_run(relays))
    watch.look()
    relays.execute("update dovecote.relay_state set epoch = 1")

    with pytest.raises(NewerRelay, match=r"epoch 0 is over$"):
        watch.look()


def test_a_reader_ends_where_the_sequence_was_set_back(relays: psycopg.Connection[TupleRow]) -> None:
    relays.execute("select setval('dovecote.outbox_position', 2)")
    reader = Reader(relays, 0, 100)
    reader.read()
    relays.execute("select setval('dovecote.outbox_position', 1)")

    with pytest.raises(SequenceFault, match="was set back from 2 to 1"):
        reader.read()


def test_recovering_sends_what_was_passed_before_anybody_led(
    settings: Settings, database: Connection, states: States
) -> None:
    with in_flight(settings, states, [a_route()]) as system:
        write_quotes(system, range(20))
        system.until_quiet()
    with system_for(settings, [a_route()]) as system:
        database.execute("select setval('dovecote.outbox_position', 1, false)")
        write_quotes(system, range(100, 105))
        database.execute("select setval('dovecote.outbox_position', 20)")
    with in_flight(settings, states, [a_route()]) as system:
        eventually(states.is_("leading"), 10, "nothing is wrong with the sequence any more")

        assert recover(system).unread == 5

        system.until_quiet()
        assert sorted(of("test.note", system)) == [*range(20), *range(100, 105)]
        eventually(states.is_("leading"), 10, "a new leadership")
        epoch = system.status().relay.epoch
        database.execute("update dovecote.relay_state set epoch = epoch + 1, refused_since = clock_timestamp()")
        database.execute("select dovecote.recover_sequence()")
        epoch += 1
        eventually(lambda: system.status().relay.epoch == epoch + 2, 10, "the leader, which is idle, begins anew")


@pytest.mark.parametrize("change", ["cache 20", "increment 5", "cycle"])
def test_a_sequence_that_is_altered_ends_the_leadership(
    settings: Settings, database: Connection, states: States, change: str
) -> None:
    url = settings.database.url.get_secret_value()
    with (
        in_flight(settings, states, [a_route()]) as system,
        psycopg.connect(url, autocommit=True) as one,
        psycopg.connect(url, autocommit=True) as another,
    ):
        eventually(states.is_("leading"), 10, "a relay leads")

        def write(*prices: int) -> None:
            for price in prices:
                insert_quote(one, price)
                insert_quote(another, price + 1)

        database.execute(f"alter sequence dovecote.outbox_position {change}")
        write(0, 2, 4)
        eventually(states.is_("refuses"), 10, "the leader ends in a refusal")
        write(6, 8)
        recover(system)
        write(10, 12)  # by sessions that still had a block of their own

        eventually(lambda: len(of("test.note", system)) == 14, 10, "each event is acted on")
        assert sorted(of("test.note", system)) == list(range(14))
        state = database.execute("select cache, increment, cycles from dovecote.sequence_state()").fetchone()
        assert state == (1, 1, False)


def insert_quote(connection: Connection, price: int) -> None:
    connection.execute(
        """
        insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)
        values ('price', 'EUR', 'pricing.price_quoted.v1', jsonb_build_object('symbol', 'EUR', 'price', %s::text,
            'as_of', '2026-11-20T12:00:00Z', 'occurred_at', '2026-11-20T12:00:00Z'))
        """,
        (price,),
    )


def test_recovering_waits_for_who_has_written_and_then_gives_up(settings: Settings, database: Connection) -> None:
    database.execute("alter function dovecote.recover_sequence set lock_timeout = '100ms'")
    with (
        system_for(settings, [a_route()]) as system,
        psycopg.connect(database.info.dsn, password=database.info.password) as writer,
    ):
        position = insert(writer)
        database.execute("update dovecote.relay_state set checkpoint = %s", (position + 10,))

        with pytest.raises(CannotRecover, match="stays open"):
            recover(system)

        assert operations.audit.list_audit_entries(system.engine).items == []
        database.execute("alter function dovecote.recover_sequence set lock_timeout = '10s'")
        with ThreadPoolExecutor(1) as pool:
            recovering = pool.submit(recover, system)
            waits = "select true from pg_locks where not granted and relation = 'dovecote.outbox_position'::regclass"
            eventually(lambda: database.execute(waits).fetchone(), 10, "it waits for the writer")
            for _ in range(10):
                insert(writer)  # up to the checkpoint, and one more
            insert(writer)
            writer.commit()
            assert recovering.result(20).changed
        assert database.execute("select dovecote.sequence_fault()").fetchone() == (None,)
        unread = "select count(*), count(distinct position) from dovecote.outbox"
        assert database.execute(unread).fetchone() == (12, 12)
        last = "select max(position) from dovecote.outbox"
        assert database.execute(last).fetchone() == (insert(database) - 1,)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("select", ""),
        ("select nextval('dovecote.outbox_position')", ""),
        ("select setval('dovecote.outbox_position', 7, false)", ""),
        ("insert into dovecote.subscriptions values ('h', 'a.b.v1', 7)", "has handed out 0, and position 7 is in use"),
        (
            "insert into dovecote.published_batches (positions, events, epoch) values ('{[3,6)}', 3, 1)",
            "has handed out 0, and position 5 is in use",
        ),
        (
            "insert into dovecote.outbox (position, aggregate_type, aggregate_id, event_type, payload)"
            " values (9, 'a', 'b', 'c.d.v1', '{}')",
            "has handed out 0, and position 9 is in use",
        ),
        ("update dovecote.relay_state set checkpoint = 4", "has handed out 0, and position 4 is in use"),
        ("alter sequence dovecote.outbox_position increment -1 minvalue -9", "increment -1"),
    ],
)
def test_whatever_is_known_of_positions_has_to_be_behind_the_sequence(
    database: Connection, change: str, fault: str
) -> None:
    database.execute(change)

    same = "select h.last_position = s.handed_out from dovecote.low_watermark() h, dovecote.sequence_state() s"
    assert database.execute(same).fetchone() == (True,), "the relay reckons as the check does"
    (found,) = database.execute("select dovecote.sequence_fault()").fetchone() or (None,)

    assert fault in (found or "")
    assert (found is None) == (fault == "")
    database.execute("select dovecote.recover_sequence()")
    assert database.execute("select dovecote.sequence_fault()").fetchone() == (None,)


def test_the_command_says_in_words_and_numbers_what_it_would_do_and_does(
    settings: Settings, database: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", settings.database.url.get_secret_value())
    database.execute("update dovecote.relay_state set checkpoint = 40")
    insert(database)

    def run_recover(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["recover", *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    assert "would go on after 40" in run_recover("--dry-run")
    assert '"unread": 1' in run_recover("--dry-run", "--json")
    assert "1 events that the relay had passed now get new positions" in run_recover("--reason", "restored")
    assert run_recover().startswith("nothing to do: positions are handed out in order, 41 was the last")
