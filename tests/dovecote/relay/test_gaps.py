"""Gaps are looked into when a writer that could fill them is over, and at no other time; nothing is lost by that."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg.rows import TupleRow

from dovecote.store.gaps import LOWEST_MARK_OF_ENDED, active_writers
from dovecote.store.reader import _IN_GAPS, Reader
from tests.support.outbox_rows import Connection, insert, positions_in

pytestmark = pytest.mark.servers

Opened = Callable[[], Connection]


@dataclass
class Watched:
    """A reader's connection, and where it has looked into gaps: the first positions of each look's stretches."""

    connection: Connection
    looks: list[list[int]] = field(default_factory=list)


@pytest.fixture
def watched(url: str) -> Iterator[Watched]:
    looks: list[list[int]] = []

    class Watching(psycopg.Cursor[TupleRow]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> "Watching":
            if query == _IN_GAPS:
                looks.append(params[1])  # the first one is a number of bytes
            return super().execute(query, params, **options)

    with psycopg.connect(url, autocommit=True, cursor_factory=Watching) as connection:
        yield Watched(connection, looks)


def leave_a_gap(writer: Connection) -> int:
    """Take a position, roll back, and commit another one behind it."""
    gap = insert(writer, "given up")
    writer.rollback()
    insert(writer, "B")
    writer.commit()
    return gap


def xid_of(writer: Connection) -> int:
    (xid,) = writer.execute("select pg_current_xact_id()::text::bigint").fetchone() or (0,)
    return int(xid)


# What is not looked into --------------------------------------------------------------------------


def test_gaps_are_looked_into_no_more_while_nobody_ends_who_could_fill_them(opened: Opened, watched: Watched) -> None:
    reader = Reader(watched.connection, 0, 100)
    held, other = opened(), opened()
    insert(held, "A")
    for _ in range(20):
        leave_a_gap(other)
    reader.read()
    reader.read()
    before = len(watched.looks)

    for _ in range(10):
        reader.read()

    assert len(reader._gaps) == 20
    assert len(watched.looks) == before


def test_only_what_lies_above_the_low_water_mark_of_the_writer_that_ended_is_looked_into(
    opened: Opened, watched: Watched
) -> None:
    reader = Reader(watched.connection, 0, 100)
    held, other, late = opened(), opened(), opened()
    insert(held, "A")
    gaps = [leave_a_gap(other) for _ in range(20)]
    insert(late, "C")
    insert(other, "B")
    other.commit()
    reader.read()
    reader.read()
    watched.looks.clear()

    late.commit()

    assert len(reader.read().rows) == 1
    assert all(first > gaps[-1] for look in watched.looks for first in look)


def test_a_savepoint_that_is_open_does_not_make_its_transaction_seem_over(opened: Opened, watched: Watched) -> None:
    reader = Reader(watched.connection, 0, 100)
    writer, other = opened(), opened()
    insert(writer, "A")
    for name in ("one", "two"):
        writer.execute(f"savepoint {name}")
        insert(writer, "A")
    insert(other, "B")
    other.commit()
    reader.read()
    reader.read()
    watched.looks.clear()

    for _ in range(5):
        reader.read()

    assert watched.looks == []
    writer.commit()
    assert len(reader.read().rows) == 3


# What is found ------------------------------------------------------------------------------------


def test_a_writer_that_the_locks_never_showed_is_found(opened: Opened, relays: Connection) -> None:
    reader = Reader(relays, 0, 100)
    unseen, other = opened(), opened()
    reader.read()
    # After the look at the locks, and before the rows are read.
    taken, passed = insert(unseen, "A"), insert(other, "B")
    other.commit()
    assert positions_in(reader.read(at_once=True)) == [passed]

    unseen.commit()

    assert positions_in(reader.read()) == [taken]
    assert reader.checkpoint == passed


def test_an_event_comes_before_its_successor_although_its_writer_was_active_at_the_last_look(
    opened: Opened, relays: Connection
) -> None:
    reader = Reader(relays, 0, 100)
    first, second = opened(), opened()
    earlier, unrelated = insert(first, "A"), insert(second, "B")
    second.commit()
    assert positions_in(reader.read()) == [unrelated]

    first.commit()
    later = insert(second, "A")
    second.commit()

    # By the same look at the locks: pg_locks would still show the first as active.
    assert positions_in(reader.read(at_once=True)) == [earlier, later]


def test_of_a_writer_that_ends_while_gaps_are_looked_into_nothing_is_taken_before_its_first_event(
    opened: Opened, url: str
) -> None:
    writer, other = opened(), opened()
    ends: list[Connection] = []

    class Ending(psycopg.Cursor[TupleRow]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> "Ending":
            found = super().execute(query, params, **options)
            if ends and query == LOWEST_MARK_OF_ENDED:
                ends.pop().commit()
            return found

    with psycopg.connect(url, autocommit=True, cursor_factory=Ending) as connection:
        reader = Reader(connection, 0, 100)
        first, passed = insert(writer, "A"), insert(other, "B")
        other.commit()
        assert positions_in(reader.read()) == [passed]
        # Above the sequence as it was read then: it is looked into whichever writer is over.
        second, passed = insert(writer, "A"), insert(other, "B")
        other.commit()
        assert positions_in(reader.read(at_once=True)) == [passed]

        ends.append(writer)

        assert positions_in(reader.read()) == [first, second]


def test_an_event_comes_before_its_successor_although_its_writer_key_is_still_held(
    opened: Opened, relays: Connection
) -> None:
    reader = Reader(relays, 0, 100)
    first, second = opened(), opened()
    earlier, unrelated = insert(first, "A"), insert(second, "B")
    second.commit()
    assert positions_in(reader.read()) == [unrelated]
    # Between the commit's being seen and the release of its writer key; here for as long as the session likes.
    first.execute("select pg_advisory_lock_shared(dovecote.writer_key(0))")

    first.commit()
    later = insert(second, "A")
    second.commit()

    assert positions_in(reader.read()) == [earlier, later]


def test_a_transaction_prepared_and_looked_at_again_and_again_is_found_when_it_commits(
    opened: Opened, watched: Watched
) -> None:
    (allowed,) = watched.connection.execute("show max_prepared_transactions").fetchone() or ("0",)
    if allowed == "0":
        pytest.skip("this server has max_prepared_transactions = 0")
    reader = Reader(watched.connection, 0, 100)
    distributed, other = opened(), opened()
    prepared, xid = insert(distributed, "A"), xid_of(distributed)
    distributed.execute("prepare transaction 'dovecote-gaps'")
    insert(other, "B")
    other.commit()
    reader.read()
    reader.read()
    watched.looks.clear()
    for _ in range(5):
        reader.read()
    assert [shown for _, shown in active_writers(watched.connection)] == [xid]
    assert watched.looks == []

    watched.connection.execute("commit prepared 'dovecote-gaps'")

    assert positions_in(reader.read()) == [prepared]


def test_each_writer_is_shown_with_its_low_water_mark_and_its_transaction(opened: Opened, relays: Connection) -> None:
    first, second, other = opened(), opened(), opened()
    insert(other, "B")
    other.commit()
    insert(first, "A")
    insert(second, "C")
    other.execute("select pg_current_xact_id()")  # a transaction, and no writer

    assert set(active_writers(relays)) == {(1, xid_of(first)), (2, xid_of(second))}
    assert relays.execute("select last_position, safe_position from dovecote.low_watermark()").fetchone() == (3, 1)


# More than a batch of late rows -------------------------------------------------------------------


def test_rows_beyond_a_large_import_wait_only_for_what_is_of_their_aggregate(
    opened: Opened, relays: Connection
) -> None:
    reader = Reader(relays, 0, batch_size=5)
    bulk, other = opened(), opened()
    imported = [insert(bulk, "A") for _ in range(12)]
    insert(other, "B")
    other.commit()
    reader.read()
    bulk.commit()
    behind, free, behind_too = insert(other, "A"), insert(other, "C"), insert(other, "A")
    other.commit()

    batches = [positions_in(reader.read()) for _ in range(4)]

    assert batches == [[*imported[:5], free], imported[5:10], [*imported[10:], behind, behind_too], []]
    assert reader.checkpoint == behind_too


def test_a_live_event_is_handed_out_with_the_first_batch_after_an_import_has_committed(
    opened: Opened, relays: Connection
) -> None:
    reader = Reader(relays, 0, batch_size=100)
    bulk, other = opened(), opened()
    bulk.execute(
        """
        insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)
        select 'price', 'A' || n, 'pricing.price_quoted.v1', '{}' from generate_series(1, 1000) n
        """
    )
    reader.read()
    bulk.commit()
    live = insert(other, "live")
    other.commit()

    assert live in positions_in(reader.read())
    handed_out = [position for _ in range(10) for position in positions_in(reader.read())]
    assert len(handed_out) == 900
    assert reader.checkpoint == live
