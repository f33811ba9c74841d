"""Which gaps may have been filled since they were last read: those of a writer that has ended.

A gap is a position below the high-water mark that was not visible when its neighbours were read. It belongs to an
active writer, or to one that was rolled back, and then it stays empty. Reading a gap costs an index search, and a long
transaction leaves thousands; so the reader asks first whether any writer that could own one has ended.
"""

from collections.abc import Sequence

import psycopg
from psycopg.rows import TupleRow

from dovecote.store.positions import multirange_of

Connection = psycopg.Connection[TupleRow]

_ACTIVE_WRITERS = "select positions, xids from dovecote.active_writers()"
# A commit is visible before the lock with the writer's low-water mark is released, so pg_locks still lists a writer
# whose successor has been read already. The snapshot does not.
LOWEST_MARK_OF_ENDED = """
    select min(low_water_mark) from unnest(%s::bigint[], %s::bigint[]) as writer (low_water_mark, xid)
    where pg_visible_in_snapshot(xid::text::xid8, pg_current_snapshot())
"""
# By position and by aggregate, each through its index and with bounds, whatever the statistics say: the limits keep
# the planner from swapping the joins and reading the whole outbox.
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
    """The writers that were listed by the last two calls of `refresh`.

    A writer that ended between the two calls is in the older list only, so both are needed.
    """

    def __init__(self) -> None:
        self._now: set[tuple[int, int]] = set()
        self._before: set[tuple[int, int]] = set()

    def refresh(self, connection: Connection, *, are_any: bool) -> None:
        """List them again: after the safe position was read, and before rows are.

        Without `are_any` no writer can own a position up to the safe one, and gaps above it are read in any case. That
        is the usual case and saves a statement.
        """
        self._before, self._now = self._now, set(active_writers(connection)) if are_any else set()

    def lowest_mark_of_ended(self, connection: Connection) -> int | None:
        """Return the lowest low-water mark of the writers that have ended; None when none has.

        Call it after the rows above the high-water mark were read: see `Reader.read`.
        """
        known = self._before | self._now
        if not known:
            return None
        row = connection.execute(
            LOWEST_MARK_OF_ENDED, ([mark for mark, _ in known], [xid for _, xid in known])
        ).fetchone()
        assert row is not None
        mark: int | None = row[0]
        return mark


def active_writers(connection: Connection) -> list[tuple[int, int]]:
    """Return the low-water mark and the transaction id of each active writer."""
    row = connection.execute(_ACTIVE_WRITERS).fetchone()
    assert row is not None
    return list(zip(*row, strict=True))


def behind_unread(connection: Connection, positions: Sequence[int], unread: Sequence[range]) -> set[int]:
    """Return the positions that have an unread predecessor of the same aggregate in these gaps."""
    if not positions or not unread:
        return set()
    parameters = (list(positions), unread[0].start, unread[-1].stop, multirange_of(unread))
    return {position for (position,) in connection.execute(BEHIND_UNREAD, parameters)}
