"""Which gaps can have been filled since they were last looked into: those of a writer that has ended.

A gap is a position below the frontier that was not there when its neighbours were read. It belongs to a writer that
is at work, or to one that was rolled back, and then to nobody. Looking into a gap costs a search of the index, and a
long transaction leaves thousands; so the reader asks first whether any writer that could own one is over.
"""

from collections.abc import Sequence

import psycopg
from psycopg.rows import TupleRow

from dovecote.store.positions import multirange_of

Connection = psycopg.Connection[TupleRow]

_AT_WORK = "select floors, xids from dovecote.writers_at_work()"
# A commit is visible before the writer's floor is given back, so pg_locks says "at work" of one whose successor has
# been read already. The snapshot says it rightly.
LOWEST_FLOOR_OF_ENDED = """
    select min(floor) from unnest(%s::bigint[], %s::bigint[]) as writer (floor, xid)
    where pg_visible_in_snapshot(xid::text::xid8, pg_current_snapshot())
"""
# By position and by aggregate, each through its index and with bounds, whatever the statistics say: the limits keep
# the planner from turning the joins round and reading the whole outbox.
BEHIND_UNREAD = """
    select wanted.position
    from unnest(%s::bigint[]) as wanted (position)
    cross join lateral (select o.aggregate_type, o.aggregate_id from dovecote.outbox o
                        where o.position = wanted.position limit 1) o
    where (select true from dovecote.outbox before
           where before.aggregate_type = o.aggregate_type and before.aggregate_id = o.aggregate_id
             and before.position >= %s and before.position < least(wanted.position, %s)
             and before.position <@ %s::int8multirange limit 1)
"""


class Writers:
    """The writers that the last two looks at the locks have shown.

    One that ended between the two looks is in the first of them only, so both are needed.
    """

    def __init__(self) -> None:
        self._now: set[tuple[int, int]] = set()
        self._before: set[tuple[int, int]] = set()

    def look(self, connection: Connection, *, at_any: bool) -> None:
        """Look again: after the horizon was asked for, and before rows are.

        Without `at_any` the horizon has shown that no writer can own a position below it: what is above it, the
        reader looks into for its own sake. That is the usual case and saves a statement.
        """
        self._before, self._now = self._now, set(writers_at_work(connection)) if at_any else set()

    def lowest_floor_of_ended(self, connection: Connection) -> int | None:
        """Return above which position something may have turned up; None when none of these writers is over.

        To be asked after the rows beyond the frontier were read: see `Reader.read`.
        """
        known = self._before | self._now
        if not known:
            return None
        row = connection.execute(
            LOWEST_FLOOR_OF_ENDED, ([floor for floor, _ in known], [xid for _, xid in known])
        ).fetchone()
        assert row is not None
        floor: int | None = row[0]
        return floor


def writers_at_work(connection: Connection) -> list[tuple[int, int]]:
    """Return the floor and the transaction of each writer."""
    row = connection.execute(_AT_WORK).fetchone()
    assert row is not None
    return list(zip(*row, strict=True))


def behind_unread(connection: Connection, positions: Sequence[int], unread: Sequence[range]) -> set[int]:
    """Return those positions before which something unread, in these gaps, is there of the same aggregate."""
    if not positions or not unread:
        return set()
    parameters = (list(positions), unread[0].start, unread[-1].stop, multirange_of(unread))
    return {position for (position,) in connection.execute(BEHIND_UNREAD, parameters)}
