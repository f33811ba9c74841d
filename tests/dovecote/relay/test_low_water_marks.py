"""What a low-water mark says is true in every state of the database, and at rest it is exact."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import psycopg
import pytest
from sqlalchemy import text

from dovecote.settings import Settings
from dovecote.store.reader import Connection
from tests.support.effects import a_route, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.random_histories import FAIL, FIRST, STEP, History, one
from tests.support.system import system_for

pytestmark = pytest.mark.servers


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
    marks = history.relay.execute("select handler_name, low_water_mark from dovecote.progress").fetchall()
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
        found = self.connection.execute("select handler_name, low_water_mark from dovecote.progress")
        return {row[0]: row[1] for row in found}


@pytest.fixture
def outbox(relays: Connection) -> Outbox:
    return Outbox(relays)


def test_every_event_is_read_once_and_a_backlog_costs_a_read_of_its_head(outbox: Outbox) -> None:
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

    # Both versions of an event at once: neither has been wanted because of the other.
    outbox.subscribe("one", "s.b.v1", "s.b.v2", since=2)

    assert outbox.marks() == {"one": 2}
    outbox.process("one", 2, 5)
    outbox.step()
    assert outbox.marks() == {"one": 9}
    outbox.connection.execute("update dovecote.subscriptions set since_position = 0 where event_type = 's.b.v1'")
    outbox.step()
    assert outbox.marks() == {"one": 0}


def test_a_new_version_of_a_wanted_event_was_waited_for_before_anybody_knew_it(outbox: Outbox) -> None:
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
    outbox.connection.execute("select dovecote.unsubscribe_handler('two', 'me')")
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

    assert outbox.marks() == {"one": 1}, "the event that was committed late is still open"


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
    " where query like '%dovecote.move_low_water_marks(%' and pid <> pg_backend_pid()"
)


def test_a_relay_moves_the_marks_says_nothing_when_idle_and_begins_anew_when_cut_off(settings: Settings) -> None:
    with system_for(settings, [a_route("test.one"), a_route("test.two")]) as system:
        make_room_for_effects(system.engine)

        def are_at(position: int) -> bool:
            with system.engine.connect() as connection:
                marks = connection.scalars(text("select low_water_mark from dovecote.progress")).all()
            return list(marks) == [position, position]

        def session() -> Any:
            with system.engine.connect() as connection:
                return connection.execute(text(MARKS_SESSION)).one_or_none()

        with system.running():
            write_quotes(system, range(1, 6))
            eventually(lambda: are_at(5), 20, "marks behind all five events")
            at_rest = session()
            time.sleep(2.5)  # two of its steps and more, in which it must say nothing: there is no condition to await
            assert session() == at_rest

            with system.engine.connect() as connection:
                connection.execute(text("select pg_terminate_backend(:pid)"), {"pid": at_rest.pid})
            write_quotes(system, [6])
            eventually(lambda: are_at(6), 20, "marks behind the sixth event")
            assert system.status().relay.epoch == 1, "the leadership went on"
