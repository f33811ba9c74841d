"""Random histories of an outbox: writers, consumers, leaders and failures in any order, with the marks moved beside."""

import random
from typing import Any

import psycopg

from dovecote.store.positions import multirange
from dovecote.store.reader import Connection, Reader, positions
from dovecote.store.subscriptions import SUBSCRIBE

# As all sessions of ours. Where Postgres has it, compiling these queries takes longer than running them.
NO_JIT = "-c jit=off"
TYPES = ["s.a.v1", "s.b.v1", "s.b.v2", "s.c.v1"]

# Of every event at or below `examined` and not in `open`: is it done with?
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
# The first event that is not done with, a version among them that newer code will ask for.
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
PARTITION_BLOCKERS = """
    select handler_name, sum(events)::bigint
    from dovecote.partition_blockers('00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff')
    where blocker = 'unprocessed' group by 1
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
    select events_read, outstanding, has_moved, is_behind, is_open
    from dovecote.move_low_water_marks(%s, %s, %s::integer, %s::integer)
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
        in_flight = writer.info.transaction_status != psycopg.pq.TransactionStatus.IDLE
        if in_flight and self.chance.random() < (0.03 if slot == 0 else 0.5):
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
            SUBSCRIBE,
            {
                "epoch": self.epoch,
                "checkpoint": checkpoint,
                "handlers": [handler for handler, _ in wanted],
                "event_types": [kind for _, kind in wanted],
                "replayable": [True for _ in wanted],
                "ordered": [True for _ in wanted],
            },
        )
        self.published_upto = max(self._reader.high_water_mark, checkpoint)
        # As _verify_redis does after a leader that knew less: what is published and not done is sent again.
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
            for handler, mark in self.checks.execute("select handler_name, low_water_mark from dovecote.progress"):
                assert mark >= self._low.get(handler, 0), f"the mark of {handler} went back"
                self._low[handler] = mark
            blockers: dict[str, int] = dict(self.checks.execute(PARTITION_BLOCKERS).fetchall())
            for handler, events, first in self.checks.execute(TRUTH).fetchall():
                assert blockers.get(handler, 0) == events
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
