"""Reading the outbox forward loses nobody, hands out nothing twice and keeps the order of each aggregate."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal

import psycopg
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from sqlalchemy import text

from dovecote.store import reader as reading
from dovecote.store.connections import connect, sessions_for
from dovecote.store.reader import Reader, Row, positions
from dovecote.unit_of_work import unit_of_work
from tests.support.outbox_rows import Connection, insert, positions_in, record
from tests.support.profiles import examples
from tests.support.quotes import a_quote

pytestmark = pytest.mark.servers

WRITERS = 12
AGGREGATES = range(1, 21)
CROWDED_SECONDS = 3.0


# A crowd of writers, an honest reader and a naive one --------------------------------------------


@dataclass
class Seen:
    """What a reader was handed, in order: position, aggregate, version."""

    events: list[tuple[int, str, int]] = field(default_factory=list)

    def add(self, rows: Sequence[Row]) -> None:
        for position, _, envelope in rows:
            content = json.loads(envelope)
            self.events.append((position, content["subject"], int(Decimal(content["data"]["price"]))))

    @property
    def positions(self) -> list[int]:
        return [position for position, _, _ in self.events]

    def out_of_order(self) -> list[tuple[int, str, int]]:
        newest: dict[str, int] = {}
        wrong = []
        for event in self.events:
            _, aggregate, version = event
            if version <= newest.get(aggregate, 0):
                wrong.append(event)
            newest[aggregate] = max(version, newest.get(aggregate, 0))
        return wrong


@dataclass
class Aftermath:
    written: set[int]
    handed_out: int
    honest: Seen
    naive: Seen


class Dawdler:
    """A writer that touches several aggregates in one transaction, takes its time, and gives up now and then."""

    def __init__(self, url: str, seed: int, stop: threading.Event) -> None:
        self._url, self._stop, self._chance = url, stop, random.Random(seed)

    def some_aggregates(self) -> list[int]:
        return sorted(self._chance.sample(AGGREGATES, self._chance.choice([1, 1, 1, 2, 3])))

    def dawdle(self, likely: float, max_seconds: float) -> None:
        if self._chance.random() < likely:
            time.sleep(self._chance.random() * max_seconds)  # this is the slow writer that the test is about

    def with_raw_sql(self) -> None:
        with psycopg.connect(self._url) as connection:
            while not self._stop.is_set():
                with suppress(psycopg.errors.DeadlockDetected, _ChangedMyMind), connection.transaction():
                    for aggregate in self.some_aggregates():
                        with suppress(_ChangedMyMind), connection.transaction():  # a savepoint
                            self._touch(connection, aggregate)
                            self._perhaps_not(0.1)
                    self.dawdle(0.05, 0.2)
                    self._perhaps_not(0.1)

    def with_units_of_work(self) -> None:
        engine = connect(self._url, pool_size=1)
        sessions = sessions_for(engine)
        while not self._stop.is_set():
            with suppress(_ChangedMyMind), unit_of_work(sessions) as uow:
                for aggregate in self.some_aggregates():
                    with suppress(_ChangedMyMind), uow.session.begin_nested():
                        version = uow.session.scalar(
                            text("update counters set version = version + 1 where id = :id returning version"),
                            {"id": aggregate},
                        )
                        uow.emit(a_quote(str(aggregate), version))
                        self.dawdle(0.5, 0.01)
                        self._perhaps_not(0.1)
                self._perhaps_not(0.1)
        engine.dispose()

    def _touch(self, connection: Connection, aggregate: int) -> None:
        row = connection.execute(
            "update counters set version = version + 1 where id = %s returning version", (aggregate,)
        ).fetchone()
        assert row
        self.dawdle(0.5, 0.01)
        insert(connection, aggregate, row[0])

    def _perhaps_not(self, likely: float) -> None:
        if self._chance.random() < likely:
            raise _ChangedMyMind


class _ChangedMyMind(Exception):
    pass


def read_honestly(url: str, seen: Seen, stop: threading.Event) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        reader = Reader(connection, checkpoint=0, batch_size=25)
        while True:
            last_round = stop.is_set()
            batch = reader.read()
            seen.add(batch.rows)
            if last_round and not batch.rows:
                return
            time.sleep(0 if batch.rows else 0.001)


def read_naively(url: str, seen: Seen, stop: threading.Event) -> None:
    """Keep nothing but the last position seen: what must not be done."""
    with psycopg.connect(url, autocommit=True) as connection:
        reader, last = Reader(connection, 0, 25), 0
        while True:
            last_round = stop.is_set()
            rows = reader.envelopes.read(reading._BEYOND, last, 25).rows
            seen.add(rows)
            last = positions(rows)[-1] if rows else last
            if last_round and not rows:
                return
            time.sleep(0 if rows else 0.001)


@pytest.fixture(scope="module")
def aftermath(database_url: str) -> Aftermath:
    """Twelve writers for some seconds, and two readers beside them."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("create table counters (id int primary key, version int not null default 0)")
        connection.execute("insert into counters select generate_series(1, %s)", (len(AGGREGATES),))
    writers_stop, readers_stop = threading.Event(), threading.Event()
    honest, naive = Seen(), Seen()
    dawdlers = [Dawdler(database_url, seed, writers_stop) for seed in range(WRITERS)]
    writers = [
        threading.Thread(target=dawdler.with_units_of_work if seed % 2 else dawdler.with_raw_sql)
        for seed, dawdler in enumerate(dawdlers)
    ]
    readers = [
        threading.Thread(target=read_honestly, args=(database_url, honest, readers_stop)),
        threading.Thread(target=read_naively, args=(database_url, naive, readers_stop)),
    ]

    for thread in (*readers, *writers):
        thread.start()
    time.sleep(CROWDED_SECONDS)
    writers_stop.set()
    for thread in writers:
        thread.join()
    readers_stop.set()
    for thread in readers:
        thread.join()

    with psycopg.connect(database_url, autocommit=True) as connection:
        written = {position for (position,) in connection.execute("select position from dovecote.outbox")}
        (last_value,) = connection.execute("select last_value from dovecote.outbox_position").fetchone() or (0,)
    return Aftermath(written, last_value, honest, naive)


@pytest.mark.once
def test_a_crowd_of_dawdling_writers_loses_no_event(aftermath: Aftermath) -> None:
    assert len(aftermath.written) > 500, "too little happened to say anything"
    assert len(aftermath.written) < aftermath.handed_out, "nobody rolled back"
    assert set(aftermath.honest.positions) == aftermath.written


def test_no_event_is_handed_out_twice(aftermath: Aftermath) -> None:
    assert [position for position, times in Counter(aftermath.honest.positions).items() if times > 1] == []


def test_the_events_of_an_aggregate_are_handed_out_in_order(aftermath: Aftermath) -> None:
    assert aftermath.honest.out_of_order() == []


def test_a_reader_that_keeps_only_the_last_position_loses_events(aftermath: Aftermath) -> None:
    lost = aftermath.written - set(aftermath.naive.positions)

    assert len(lost) > len(aftermath.written) / 100, "the crowd is too well behaved to show a loss"


# One thing at a time ------------------------------------------------------------------------------


def test_a_stuck_writer_delays_nobody_and_holds_the_checkpoint(
    opened: Callable[[], Connection], relays: Connection
) -> None:
    reader = Reader(relays, 0, 100)
    stuck, other = opened(), opened()
    held = insert(stuck, "A")

    passed = insert(other, "B")
    other.commit()

    assert positions_in(reader.read()) == [passed]
    assert reader.checkpoint < held
    stuck.commit()
    assert positions_in(reader.read()) == [held]
    assert reader.checkpoint == passed
    assert reader.read().rows == []


def test_an_old_foreign_transaction_holds_nothing(opened: Callable[[], Connection], relays: Connection) -> None:
    foreign, writer = opened(), opened()
    foreign.execute("set transaction isolation level repeatable read")
    foreign.execute("create temporary table elsewhere as select pg_current_xact_id()")
    reader = Reader(relays, 0, 100)

    written = insert(writer)
    writer.commit()

    assert positions_in(reader.read()) == [written]
    assert reader.checkpoint == written


def test_the_gap_of_a_writer_that_rolled_back_is_forgotten(
    opened: Callable[[], Connection], relays: Connection
) -> None:
    reader = Reader(relays, 0, 100)
    fickle, other = opened(), opened()
    abandoned, committed = insert(fickle), insert(other)
    other.commit()
    reader.read()
    assert reader._gaps == [range(abandoned, abandoned + 1)]

    fickle.rollback()

    assert reader.read().rows == []
    assert reader._gaps == []
    assert reader.checkpoint == committed


def test_a_prepared_transaction_is_waited_for(opened: Callable[[], Connection], relays: Connection) -> None:
    (allowed,) = relays.execute("show max_prepared_transactions").fetchone() or ("0",)
    if allowed == "0":
        pytest.skip("this server has max_prepared_transactions = 0")
    reader = Reader(relays, 0, 100)
    distributed, other = opened(), opened()
    prepared = insert(distributed, "A")
    distributed.execute("prepare transaction 'dovecote-test'")
    passed = insert(other, "B")
    other.commit()
    assert positions_in(reader.read()) == [passed]
    assert reader.checkpoint < prepared

    relays.execute("commit prepared 'dovecote-test'")

    assert positions_in(reader.read()) == [prepared]
    assert reader.checkpoint == passed


def test_a_rollback_to_a_savepoint_does_not_hide_what_is_written_after_it(
    opened: Callable[[], Connection], relays: Connection
) -> None:
    reader = Reader(relays, 0, 100)
    writer, other = opened(), opened()
    writer.execute("savepoint before_anything")
    insert(writer, "A")
    writer.execute("rollback to savepoint before_anything")
    passed = insert(other, "B")
    other.commit()

    written = insert(writer, "A")
    insert(other, "C")
    other.commit()

    assert passed in positions_in(reader.read())
    assert reader.checkpoint < written
    writer.commit()
    assert positions_in(reader.read()) == [written]


def test_a_savepoint_given_up_later_leaves_the_first_low_water_mark_in_place(
    opened: Callable[[], Connection], relays: Connection
) -> None:
    reader = Reader(relays, 0, 100)
    writer, other = opened(), opened()
    first = insert(writer, "A")
    writer.execute("savepoint later")
    insert(writer, "A")
    writer.execute("rollback to savepoint later")
    insert(other, "B")
    other.commit()

    reader.read()

    assert reader.checkpoint < first
    writer.commit()
    assert positions_in(reader.read()) == [first]


def test_ten_thousand_single_inserts_take_one_writer_key(opened: Callable[[], Connection]) -> None:
    writer = opened()

    writer.execute(
        """
        do $$ begin
            for n in 1 .. 10000 loop
                insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)
                values ('price', 'EUR', 'pricing.price_quoted.v1', '{}');
            end loop;
        end $$
        """
    )

    keys = writer.execute(
        """
        select count(*) from pg_locks
        where locktype = 'advisory' and pid = pg_backend_pid()
          and classid::bigint >> 16 = dovecote.writer_key(0) >> 48
        """
    ).fetchone()
    assert keys == (1,)


def test_a_new_reader_hands_out_only_what_was_not_recorded(
    opened: Callable[[], Connection], relays: Connection
) -> None:
    reader = Reader(relays, 0, 100)
    stuck, other = opened(), opened()
    held = insert(stuck, "A")
    published = [insert(other, "B"), insert(other, "C")]
    other.commit()
    record(relays, reader.read())
    sent_but_not_recorded = insert(other, "D")
    other.commit()
    reader.read()

    (checkpoint,) = relays.execute("select checkpoint from dovecote.relay_state").fetchone() or (None,)
    after_the_crash = Reader(relays, checkpoint, 100)

    assert checkpoint < held < published[0]
    assert positions_in(after_the_crash.read()) == [sent_but_not_recorded]
    stuck.commit()
    assert positions_in(after_the_crash.read()) == [held]
    assert after_the_crash.checkpoint == sent_but_not_recorded


def test_more_rows_than_a_batch_takes_come_in_several(opened: Callable[[], Connection], relays: Connection) -> None:
    writer = opened()
    written = [insert(writer) for _ in range(12)]
    writer.commit()
    reader = Reader(relays, 0, batch_size=5)

    batches = [positions_in(reader.read()) for _ in range(4)]

    assert batches == [written[:5], written[5:10], written[10:], []]
    assert reader.checkpoint == written[-1]


def test_more_late_rows_than_a_batch_takes_come_before_newer_ones(
    opened: Callable[[], Connection], relays: Connection
) -> None:
    reader = Reader(relays, 0, batch_size=5)
    late, other = opened(), opened()
    held = [insert(late, "A") for _ in range(12)]
    passed = insert(other, "B")
    other.commit()
    assert positions_in(reader.read()) == [passed]

    late.commit()
    newer = insert(other, "A")
    other.commit()
    batches = [reader.read() for _ in range(4)]

    assert [positions_in(batch) for batch in batches] == [held[:5], held[5:10], [*held[10:], newer], []]
    assert batches[0].checkpoint < held[5], "the checkpoint has left behind what was not handed out"
    assert reader.checkpoint == newer


# Any order of things ------------------------------------------------------------------------------


class Reading(RuleBasedStateMachine):
    """Writers begin, write, set savepoints, roll back and commit; a reader reads, crashes and starts again.

    An aggregate belongs to the transaction that touched it until that ends, as its row's lock would have it.
    """

    url: str

    @initialize()
    def start(self) -> None:
        self.writers = [psycopg.connect(self.url) for _ in range(3)]
        self.relay = psycopg.connect(self.url, autocommit=True)
        (self.base,) = self.relay.execute("select last_position from dovecote.low_watermark()").fetchone() or (0,)
        self.relay.execute("update dovecote.relay_state set checkpoint = %s", (self.base,))
        self.reader = Reader(self.relay, self.base, batch_size=3)
        self.owner: dict[int, int] = {}
        self.savepoints = [0, 0, 0]
        self.by_this_reader: list[Row] = []
        self.recorded: set[int] = set()
        self.recorded_before: set[int] = set()

    @rule(writer=st.integers(0, 2), aggregate=st.integers(0, 4), events=st.integers(1, 4))
    def write(self, writer: int, aggregate: int, events: int) -> None:
        if self.owner.setdefault(aggregate, writer) == writer:
            for _ in range(events):
                insert(self.writers[writer], aggregate)

    @rule(writer=st.integers(0, 2))
    def set_savepoint(self, writer: int) -> None:
        self.savepoints[writer] += 1
        self.writers[writer].execute(f"savepoint s{self.savepoints[writer]}")

    @precondition(lambda self: any(self.savepoints))
    @rule(writer=st.integers(0, 2))
    def roll_back_to_savepoint(self, writer: int) -> None:
        if self.savepoints[writer]:
            self.writers[writer].execute(f"rollback to savepoint s{self.savepoints[writer]}")

    @rule(writer=st.integers(0, 2), commit=st.booleans())
    def end(self, writer: int, commit: bool) -> None:
        self.writers[writer].commit() if commit else self.writers[writer].rollback()
        self.savepoints[writer] = 0
        self.owner = {aggregate: owner for aggregate, owner in self.owner.items() if owner != writer}

    @rule(recorded=st.booleans(), at_once=st.booleans(), checkpoint=st.booleans())
    def read(self, recorded: bool, at_once: bool = False, checkpoint: bool = True) -> None:
        batch = self.reader.read(at_once=at_once)
        self.by_this_reader += batch.rows
        self._check_this_reader()
        if recorded and batch.rows:
            record(self.relay, batch, checkpoint)
            self.recorded.update(positions_in(batch))
        elif batch.rows:
            self.start_again()  # a crash after the batch was sent

    @rule()
    def start_again(self) -> None:
        (checkpoint,) = self.relay.execute("select checkpoint from dovecote.relay_state").fetchone() or (0,)
        self.reader, self.by_this_reader = Reader(self.relay, checkpoint, batch_size=3), []
        self.recorded_before = set(self.recorded)

    def _check_this_reader(self) -> None:
        handed_out = positions(self.by_this_reader)
        assert len(handed_out) == len(set(handed_out)), "handed out twice by one reader"
        assert self.recorded_before.isdisjoint(handed_out), "handed out although an earlier reader recorded it"
        newest: dict[str, int] = {}
        for position, _, envelope in self.by_this_reader:
            aggregate = json.loads(envelope)["subject"]
            assert position > newest.get(aggregate, 0), "an aggregate's events in the wrong order"
            newest[aggregate] = position

    def teardown(self) -> None:
        if not hasattr(self, "relay"):
            return
        for writer in (0, 1, 2):
            self.end(writer, commit=writer != 1)
        before = -1
        while before < len(self.recorded):
            before = len(self.recorded)
            self.read(recorded=True)
        found = self.relay.execute("select position from dovecote.outbox where position > %s", (self.base,))
        committed = {position for (position,) in found}
        assert self.recorded == committed, "committed and recorded differ"
        (last,) = self.relay.execute("select last_position from dovecote.low_watermark()").fetchone() or (0,)
        assert self.reader.checkpoint == last
        assert self.reader._gaps == []
        for connection in (*self.writers, self.relay):
            connection.close()


@pytest.mark.once
def test_no_order_of_begins_writes_rollbacks_commits_and_crashes_loses_an_event(url: str) -> None:
    class Machine(Reading):
        pass

    Machine.url = url
    run_state_machine_as_test(
        Machine,
        settings=hypothesis_settings(
            max_examples=examples(60, 1_000),
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
