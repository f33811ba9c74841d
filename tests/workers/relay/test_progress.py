"""What a low-water mark says is true in every state of the database, and at rest it is exact."""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy import text

from tests.effects import a_route, make_room_for_effects, write_quotes
from tests.support import eventually
from tests.system import system_for
from workers.relay.positions import multirange
from workers.relay.reading import Connection, Reader, positions
from workers.relay.relay import _SUBSCRIBE
from workers.settings import Settings

pytestmark = pytest.mark.servers

# As all sessions of ours. Where Postgres has it, compiling these queries takes longer than running them.
NO_JIT = "-c jit=off"
TYPES = ["s.a.v1", "s.b.v1", "s.b.v2", "s.c.v1"]

# Of every event at or below `examined` and not in `open`: is it settled?
UNSOUND = """
    select p.handler_name, array_agg(o.position order by o.position)
    from dovecote.progress p
    join dovecote.outbox o on o.position <= p.examined and not o.position <@ p.open
    join lateral dovecote.wanted_since(array[p.handler_name], array[o.event_type]) w
        on o.position > w.since_position and not w.published_above @> o.position
    where not exists (select from dovecote.processed_events d
                      where d.event_id = o.id and d.handler_name = p.handler_name)
      and not exists (select from dovecote.deliveries d where d.event_id = o.id and d.handler_name = p.handler_name)
    group by 1
"""
# Counted over the whole outbox, without any mark. What is wanted is asked of the subscriptions themselves.
TRUTH = """
    select h.name, count(o.position), min(o.position)
    from (select distinct handler_name as name from dovecote.subscriptions) h
    left join (
        select s.handler_name, o.id, o.position from dovecote.outbox o
        join dovecote.subscriptions s on s.event_type = o.event_type
            and o.position > s.since_position and not s.published_above @> o.position
        where not exists (select from dovecote.processed_events d
                          where d.event_id = o.id and d.handler_name = s.handler_name)
          and not exists (select from dovecote.deliveries d
                          where d.event_id = o.id and d.handler_name = s.handler_name)) o on o.handler_name = h.name
    group by 1
"""
# The first event that is not settled, a version among them that newer code will ask for.
FIRST = """
    select p.handler_name, min(o.position)
    from dovecote.progress p
    left join dovecote.outbox o on exists (
        select from dovecote.wanted_since(array[p.handler_name], array[o.event_type]) w
        where o.position > w.since_position and not w.published_above @> o.position)
      and not exists (select from dovecote.processed_events d
                      where d.event_id = o.id and d.handler_name = p.handler_name)
      and not exists (select from dovecote.deliveries d where d.event_id = o.id and d.handler_name = p.handler_name)
    group by 1
"""
OBSTACLES = """
    select handler_name, sum(events)::bigint
    from dovecote.week_obstacles('00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    where obstacle = 'unprocessed' group by 1
"""
# Where an event is not blocked by what an ordered handler has not done, or by something else.
BLOCKERS = """
    select s.handler_name, e.position, expected.id, dovecote.blocker(
        s.handler_name, s.kinds, e.aggregate_type, e.aggregate_id, e.position)
    from (select handler_name, array_agg(event_type) as kinds from dovecote.subscriptions group by 1) s
    join (select * from dovecote.outbox order by position desc limit 30) e on e.event_type = any(s.kinds)
    left join lateral (
        select before.id from (
            select o.id from dovecote.outbox o
            join dovecote.subscriptions w on w.handler_name = s.handler_name and w.event_type = o.event_type
            where o.aggregate_id = e.aggregate_id and o.position < e.position
              and o.position > w.since_position and not w.published_above @> o.position
              and not exists (select from dovecote.deliveries d
                              where d.event_id = o.id and d.handler_name = s.handler_name and d.state = 'discarded')
            order by o.position desc limit 1) before
        where not exists (select from dovecote.processed_events p
                          where p.event_id = before.id and p.handler_name = s.handler_name)) expected on true
    where expected.id is distinct from dovecote.blocker(
        s.handler_name, s.kinds, e.aggregate_type, e.aggregate_id, e.position)
"""
STEP = """
    select events_read, unsettled, has_moved, is_behind, is_open
    from dovecote.move_marks(%s, %s, %s::integer, %s::integer)
"""


def one(connection: Connection, statement: str, *parameters: object) -> Any:
    row = connection.execute(statement, parameters).fetchone()
    assert row is not None
    return row[0] if len(row) == 1 else row


class History:
    """One step at a time, on many connections: writers out of order, leaders, consumers, and the marks between them."""

    def __init__(self, url: str, seed: int) -> None:
        self.chance = random.Random(seed)
        self._url = url
        self._writers: list[Connection | None] = [None] * 4
        self._consumers: list[Connection | None] = [None] * 2
        self._taken: dict[int, set[tuple[str, int]]] = {0: set(), 1: set()}
        self._known = {"one": ["s.a.v1", "s.b.v1"], "two": ["s.b.v1"], "three": ["s.a.v1"]}
        self._queued: set[tuple[str, int]] = set()
        self._published: list[tuple[int, str]] = []
        self._low: dict[str, int] = {}
        self.relay = psycopg.connect(url, autocommit=True, options=NO_JIT)
        self.marks = psycopg.connect(url, autocommit=True, options=NO_JIT)
        self.checks = psycopg.connect(url, options=NO_JIT)
        self.checks.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        self.lead()

    def run(self, steps: int) -> None:
        moves = [self.write] * 6 + [self.publish] * 3 + [self.consume] * 5 + [self.settle_failed, self.move, self.move]
        for number in range(steps):
            self.chance.choice(moves)()
            if self.chance.random() < 0.01:
                self.deploy()
            if number % 15 == 0:
                self.check()

    def end(self) -> None:
        for connection in [*self._writers, *self._consumers, self.relay, self.marks, self.checks]:
            if connection is not None:
                connection.close()

    # Writers ---------------------------------------------------------------------------------

    def write(self) -> None:
        """Go on with one of four transactions; most commit soon, some after all others, some never."""
        slot = self.chance.randrange(4)
        writer = self._writers[slot]
        if writer is None or writer.closed:
            writer = self._writers[slot] = psycopg.connect(self._url, options=NO_JIT)
        at_work = writer.info.transaction_status != psycopg.pq.TransactionStatus.IDLE
        if at_work and self.chance.random() < (0.03 if slot == 0 else 0.5):
            (writer.rollback if self.chance.random() < 0.1 else writer.commit)()
            return
        kind = self.chance.choice(TYPES)
        writer.execute("select dovecote.append_event('order', %s, %s, '{}')", (str(self.chance.randrange(8)), kind))

    # The relay -------------------------------------------------------------------------------

    def lead(self) -> None:
        """A new leader takes over, perhaps with routes that the one before it did not know."""
        self.epoch, checkpoint = one(
            self.relay, "update dovecote.relay_state set epoch = epoch + 1 returning epoch, checkpoint"
        )
        self._reader = Reader(self.relay, checkpoint, 20)
        wanted = [(handler, kind) for handler, kinds in self._known.items() for kind in kinds]
        self.relay.execute(
            _SUBSCRIBE,
            {
                "epoch": self.epoch,
                "checkpoint": checkpoint,
                "handlers": [handler for handler, _ in wanted],
                "event_types": [kind for _, kind in wanted],
            },
        )
        self.published_upto = max(self._reader.frontier, checkpoint)
        # As _greet_redis does after a leader that knew less: what is published and not done is sent again.
        self._queued = {
            (handler, position)
            for position, kind in self._published
            for handler, kinds in self._known.items()
            if kind in kinds
        }

    def publish(self) -> None:
        batch = self._reader.read()
        if batch.rows:
            self.relay.execute(
                "insert into dovecote.published_batches (positions, events, epoch) values (%s, %s, %s)",
                (multirange(positions(batch.rows)), len(batch.rows), self.epoch),
            )
            self.published_upto = max(self.published_upto, positions(batch.rows)[-1])
            self._published += [(position, kind) for position, kind, _ in batch.rows]
            self._queued.update(
                (handler, position)
                for position, kind, _ in batch.rows
                for handler, kinds in self._known.items()
                if kind in kinds
            )
        if self.chance.random() < 0.7:
            self.relay.execute(
                "update dovecote.relay_state set checkpoint = greatest(checkpoint, %s)", (batch.checkpoint,)
            )

    def deploy(self) -> None:
        handler = self.chance.choice([*self._known, "four"])
        kind = self.chance.choice(TYPES)
        kinds = self._known.setdefault(handler, [])
        if kind not in kinds:
            kinds.append(kind)
            self._low.pop(handler, None)  # it begins to want more, so its mark may go back
        self.lead()

    def move(self) -> None:
        stale = self.chance.random() < 0.1
        epoch = self.epoch - 1 if stale else self.epoch
        events = self.chance.choice([3, 10, 40])
        moved = one(self.marks, STEP, epoch, self.published_upto, events, 4)
        assert not (stale and moved[2]), "a relay that was replaced has moved a mark"

    # Consumers -------------------------------------------------------------------------------

    def consume(self) -> None:
        """Act on something, in any order; commit now or later, or fail, or lose the message."""
        slot = self.chance.randrange(2)
        consumer = self._consumers[slot]
        if consumer is not None and consumer.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            (consumer.rollback if self.chance.random() < 0.1 else consumer.commit)()
            self._taken[slot] = set()
            return
        if consumer is None:
            consumer = self._consumers[slot] = psycopg.connect(self._url, options=NO_JIT)
        there = sorted(self._queued - self._taken[1 - slot])[:30]
        if not there:
            return
        chosen = set(self.chance.sample(there, min(len(there), self.chance.choice([1, 5, 20]))))
        self._queued -= chosen
        if self.chance.random() < 0.03:
            return  # lost by the queue
        self._taken[slot] = chosen
        for handler, position in sorted(chosen):
            if self.chance.random() < 0.1:
                consumer.execute(
                    FAIL, (handler, self.chance.choice(["dead", "discarded", "retrying"]), position, handler)
                )
            else:
                consumer.execute(
                    "insert into dovecote.processed_events (event_id, handler_name)"
                    " select id, %s from dovecote.outbox where position = %s on conflict do nothing",
                    (handler, position),
                )

    def settle_failed(self) -> None:
        with self.relay.transaction():
            self.relay.execute(
                "with gone as (delete from dovecote.deliveries where ctid = (select ctid from dovecote.deliveries"
                " where state = 'retrying' order by random() limit 1 for update skip locked)"
                " returning event_id, handler_name)"
                " insert into dovecote.processed_events (event_id, handler_name)"
                " select event_id, handler_name from gone on conflict do nothing"
            )

    # What must hold --------------------------------------------------------------------------

    def check(self) -> None:
        with self.checks.transaction():
            assert self.checks.execute(UNSOUND).fetchall() == []
            assert self.checks.execute(BLOCKERS).fetchall() == []
            for handler, mark in self.checks.execute("select handler_name, mark from dovecote.progress"):
                assert mark >= self._low.get(handler, 0), f"the mark of {handler} went back"
                self._low[handler] = mark
            obstacles: dict[str, int] = dict(self.checks.execute(OBSTACLES).fetchall())
            for handler, events, first in self.checks.execute(TRUTH).fetchall():
                assert obstacles.get(handler, 0) == events
                kinds = [
                    kind
                    for (kind,) in self.checks.execute(
                        "select event_type from dovecote.subscriptions where handler_name = %s", (handler,)
                    )
                ]
                counted = one(
                    self.checks,
                    "select events, oldest, at_least from dovecote.unprocessed(%s, 9999, %s)",
                    handler,
                    kinds,
                )
                oldest = self.checks.execute(
                    "select created_at from dovecote.outbox where position = %s", (first,)
                ).fetchone()
                assert counted == (events, oldest[0] if oldest else None, False), handler

    def rest(self) -> None:
        for connection in [*self._writers, *self._consumers]:
            if connection is not None:
                connection.commit()
        for _ in range(100):
            self.publish()
        self.relay.execute(
            "update dovecote.relay_state set checkpoint = greatest(checkpoint, %s)", (self._reader.checkpoint,)
        )
        for _ in range(300):
            _, _, has_moved, _, is_open = one(self.marks, STEP, self.epoch, self.published_upto, 400, 100)
            if not has_moved and not is_open:
                break


FAIL = """
    insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state,
                                     next_attempt_at)
    select %s, id, position, aggregate_type, aggregate_id, event_type, %s, now() from dovecote.outbox o
    where position = %s and not exists (select from dovecote.processed_events p
                                        where p.event_id = o.id and p.handler_name = %s)
    on conflict do nothing
"""


@pytest.fixture
def history(url: str, request: pytest.FixtureRequest) -> Iterator[History]:
    history = History(url, cast(int, request.param))
    yield history
    history.end()


@pytest.mark.parametrize("history", [1, 2], indirect=True)
def test_a_mark_is_true_at_every_step_of_a_random_history_and_exact_at_its_end(history: History) -> None:
    history.run(450)
    history.check()
    history.rest()

    history.check()
    first = history.relay.execute(FIRST).fetchall()
    checkpoint = one(history.relay, "select checkpoint from dovecote.relay_state")
    marks = history.relay.execute("select handler_name, mark from dovecote.progress").fetchall()
    assert sorted(marks) == sorted((handler, position - 1 if position else checkpoint) for handler, position in first)


class Outbox:
    """Events by number, handlers that want them, and steps of the marks; all on one connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def write(self, events: int, kind: str = "s.a.v1") -> int:
        """Return the last position."""
        self.connection.execute(
            "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)"
            " select 'order', 'n', %s, '{}' from generate_series(1, %s)",
            (kind, events),
        )
        return self.last()

    def last(self) -> int:
        return cast(int, one(self.connection, "select max(position) from dovecote.outbox"))

    def subscribe(self, handler: str, *kinds: str, since: int = 0) -> None:
        self.connection.execute(
            "insert into dovecote.subscriptions (handler_name, event_type, since_position)"
            " select %s, unnest(%s::text[]), %s",
            (handler, list(kinds), since),
        )

    def process(self, handler: str, above: int, upto: int) -> None:
        self.connection.execute(
            "insert into dovecote.processed_events (event_id, handler_name)"
            " select id, %s from dovecote.outbox where position > %s and position <= %s",
            (handler, above, upto),
        )

    def step(self) -> Any:
        """Publish everything and move the marks; return what the step says."""
        self.connection.execute("update dovecote.relay_state set checkpoint = %s", (self.last(),))
        return one(self.connection, STEP, 0, self.last(), 5_000, 100)

    def marks(self) -> dict[str, int]:
        found = self.connection.execute("select handler_name, mark from dovecote.progress")
        return {handler: mark for handler, mark in found}  # noqa: C416 - mypy wants the pairs


@pytest.fixture
def outbox(relays: Connection) -> Outbox:
    return Outbox(relays)


def test_every_event_is_looked_at_once_and_a_backlog_costs_a_look_at_its_head(outbox: Outbox) -> None:
    outbox.subscribe("quick", "s.a.v1")
    outbox.subscribe("paused", "s.a.v1")
    outbox.process("quick", 0, outbox.write(3_000))
    outbox.step()
    read = []
    for _ in range(5):
        before = outbox.last()
        outbox.process("quick", before, outbox.write(200))
        read.append(outbox.step()[0])

    assert sum(read) <= 5 * (200 + 2 * 64)
    assert outbox.marks() == {"quick": 4_000, "paused": 0}
    assert (
        one(outbox.connection, "select open::text from dovecote.progress where handler_name = 'paused'") == "{[1,4001)}"
    )
    events_read, _, has_moved, _, is_open = outbox.step()
    assert (events_read <= 2 * 64, has_moved, is_open) == (True, False, True)


def test_what_a_handler_begins_to_want_below_its_mark_is_open(outbox: Outbox) -> None:
    outbox.subscribe("one", "s.a.v1")
    outbox.write(3, "s.b.v1")
    outbox.write(2, "s.b.v2")
    outbox.process("one", 5, outbox.write(4))
    outbox.step()
    assert outbox.marks() == {"one": 9}

    # Both versions of a fact at once: neither has been wanted because of the other.
    outbox.subscribe("one", "s.b.v1", "s.b.v2", since=2)

    assert outbox.marks() == {"one": 2}
    outbox.process("one", 2, 5)
    outbox.step()
    assert outbox.marks() == {"one": 9}
    outbox.connection.execute("update dovecote.subscriptions set since_position = 0 where event_type = 's.b.v1'")
    outbox.step()
    assert outbox.marks() == {"one": 0}


def test_a_new_version_of_a_wanted_fact_was_waited_for_before_anybody_knew_it(outbox: Outbox) -> None:
    outbox.subscribe("one", "s.b.v1")
    outbox.process("one", 0, outbox.write(3, "s.b.v1"))
    outbox.write(1, "s.b.v2")
    outbox.process("one", 4, outbox.write(3, "s.b.v1"))
    outbox.step()

    assert outbox.marks() == {"one": 3}

    outbox.subscribe("one", "s.b.v2")
    outbox.process("one", 3, 4)
    outbox.step()
    assert outbox.marks() == {"one": 7}


def test_what_is_in_the_way_is_not_looked_for_below_the_mark_unless_it_failed_there(outbox: Outbox) -> None:
    outbox.subscribe("one", "s.a.v1")
    outbox.process("one", 0, outbox.write(2))
    outbox.write(2_000, "s.not_wanted.v1")
    outbox.step()

    assert rows_read_for_blocker(outbox, before=outbox.write(1)) == 0

    outbox.connection.execute("delete from dovecote.processed_events")
    outbox.connection.execute(FAIL, ("one", "dead", 2, "one"))
    outbox.step()
    assert one(outbox.connection, BLOCKER, outbox.last()) == 2


BLOCKER = """
    select position from dovecote.outbox
    where id = (select dovecote.blocker('one', array['s.a.v1'], 'order', 'n', %s))
"""


ROWS_READ = """
    select coalesce(sum(idx_tup_fetch + seq_tup_read), 0)::bigint from pg_stat_xact_user_tables
    where relname ~ '^outbox'
"""


def rows_read_for_blocker(outbox: Outbox, before: int) -> int:
    with outbox.connection.transaction():
        read_before = one(outbox.connection, ROWS_READ)
        blocker = "select dovecote.blocker('one', array['s.a.v1'], 'order', 'n', %s)"
        assert one(outbox.connection, blocker, before) is None
        return cast(int, one(outbox.connection, ROWS_READ) - read_before)


def test_a_forgotten_handler_has_no_mark_and_what_is_reopened_is_looked_at_again(outbox: Outbox) -> None:
    outbox.subscribe("one", "s.a.v1")
    outbox.subscribe("two", "s.a.v1")
    outbox.write(10)
    outbox.process("one", 0, 10)
    outbox.process("two", 0, 10)
    outbox.step()
    outbox.connection.execute("select dovecote.forget_handler('two', 'me')")
    # As after a restore of one table: the mark says more than is there.
    outbox.connection.execute(
        "delete from dovecote.processed_events where event_id = (select id from dovecote.outbox where position = 4)"
    )

    assert one(outbox.connection, "select dovecote.reopen_progress()") == 1

    assert outbox.marks() == {"one": 0}
    outbox.step()
    assert outbox.marks() == {"one": 3}


def test_the_checkpoint_is_read_before_the_outbox(outbox: Outbox, opened: Callable[[], Connection]) -> None:
    outbox.subscribe("one", "s.a.v1")
    outbox.process("one", 0, outbox.write(1))
    outbox.step()
    writer, locker, mover = opened(), opened(), opened()
    writer.execute(
        "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)"
        " values ('order', 'n', 's.a.v1', '{}')"
    )
    outbox.process("one", 2, outbox.write(1))
    locker.execute("lock table dovecote.relay_state in access exclusive mode")

    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(one, mover, STEP, 0, 3, 5_000, 100)
        eventually(lambda: waits(outbox.connection, mover), 10, "a step that waits to read the checkpoint")
        writer.commit()
        locker.execute("update dovecote.relay_state set checkpoint = 3")
        locker.commit()
        step.result()
    mover.commit()

    assert outbox.marks() == {"one": 1}, "the event that was committed late is not settled"


def waits(connection: Connection, waiting: Connection) -> bool:
    return cast(
        bool,
        one(
            connection, "select exists (select from pg_locks where not granted and pid = %s)", waiting.info.backend_pid
        ),
    )


def test_nobody_subscribes_while_a_step_is_under_way(outbox: Outbox, opened: Callable[[], Connection]) -> None:
    outbox.write(1)
    mover, subscriber = opened(), Outbox(opened())
    one(mover, STEP, 0, 1, 5_000, 100)
    subscriber.connection.execute("set lock_timeout = '100ms'")

    with pytest.raises(psycopg.errors.LockNotAvailable):
        subscriber.subscribe("one", "s.a.v1")


MARKS_SESSION = (
    "select pid, state_change from pg_stat_activity"
    " where query like '%dovecote.move_marks(%' and pid <> pg_backend_pid()"
)


def test_a_relay_moves_the_marks_says_nothing_when_idle_and_begins_anew_when_cut_off(settings: Settings) -> None:
    with system_for(settings, [a_route("test.one"), a_route("test.two")]) as system:
        make_room_for_effects(system.engine)

        def are_at(position: int) -> bool:
            with system.engine.connect() as connection:
                marks = connection.scalars(text("select mark from dovecote.progress")).all()
            return list(marks) == [position, position]

        def session() -> Any:
            with system.engine.connect() as connection:
                return connection.execute(text(MARKS_SESSION)).one_or_none()

        with system.running():
            write_quotes(system, range(1, 6))
            eventually(lambda: are_at(5), 20, "marks behind all five events")
            at_rest = session()
            # Longer than two of its steps: nothing must come, and there is no condition to wait for.
            time.sleep(2.5)
            assert session() == at_rest

            with system.engine.connect() as connection:
                connection.execute(text("select pg_terminate_backend(:pid)"), {"pid": at_rest.pid})
            write_quotes(system, [6])
            eventually(lambda: are_at(6), 20, "marks behind the sixth event")
            assert system.status().relay.epoch == 1, "the leadership went on"
