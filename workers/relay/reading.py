"""Read the outbox forward without losing anyone.

Positions become visible out of order: a transaction that took position 7 may commit after 8 was read.
So the reader keeps two marks and what lies between them:

    checkpoint   everything at or below it is settled: committed and read, or gone for ever
    frontier     the highest position looked at
    holes        positions between the two that were not there yet when their neighbours were read

Each read asks for rows above the frontier and for rows that have turned up in the holes. A writer that
dawdles keeps the checkpoint back and leaves a hole; it delays nobody else. `dovecote.horizon()` says how
far everything is settled; it must be asked before the rows are (docs/adr/0003-reading-forward.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
from psycopg.rows import TupleRow

from workers.relay.positions import above, holes, without

Connection = psycopg.Connection[TupleRow]


#: One event: its position, its type, and its CloudEvents JSON in UTF-8. A plain tuple, as psycopg makes it in C.
Row = tuple[int, str, bytes]


@dataclass(frozen=True)
class Batch:
    """Rows in writing order. Once they are published, everything up to `checkpoint` is."""

    rows: Sequence[Row]
    checkpoint: int


# As bytes: an envelope goes to Redis as it is, and decoding it would cost as much as all else done with it here.
_SELECT = "select o.position, o.event_type, convert_to(dovecote.envelope(o), 'UTF8') from dovecote.outbox o"
_BEYOND = f"{_SELECT} where o.position > %s order by o.position limit %s"
# Hole by hole: the planner would rather read the whole outbox in order and throw away what is in none.
_IN_HOLES = """
    select o.position, o.event_type, convert_to(dovecote.envelope(o), 'UTF8')
    from unnest(%s::bigint[], %s::bigint[]) as hole (low, high)
    cross join lateral (select * from dovecote.outbox where position between hole.low and hole.high
                        order by position limit %s) o
    order by o.position limit %s
"""
_IN_BATCHES = """
    select o.position, o.event_type, convert_to(dovecote.envelope(o), 'UTF8')
    from unnest(%s::int8multirange) as stretch
    cross join lateral (select * from dovecote.outbox
                        where position >= lower(stretch) and position < upper(stretch) order by position) o
    order by o.position
"""

_PUBLISHED_ABOVE = """
    select lower(stretch), upper(stretch)
    from (select unnest(range_agg(positions)) from dovecote.published_batches
          where positions && int8multirange(int8range(%(checkpoint)s, null, '()'))) as published (stretch)
    order by 1
"""


class Reader:
    """Hands out every committed event at least once, and no event twice.

    A new reader starts from the recorded checkpoint and knows from `published_batches` what was handed
    out above it.
    """

    def __init__(self, connection: Connection, checkpoint: int, batch_size: int) -> None:
        self._connection = connection
        self._batch_size = batch_size
        self.checkpoint = self.frontier = checkpoint
        self._horizon = (checkpoint, checkpoint)
        self._holes: list[range] = []
        for start, stop in connection.execute(_PUBLISHED_ABOVE, {"checkpoint": checkpoint}):
            if stop - 1 > self.frontier:
                self._holes += holes(self.frontier, stop - 1, range(max(start, self.frontier + 1), stop))
                self.frontier = stop - 1

    def read(self, *, at_once: bool = False) -> Batch:
        """Return the next batch; an empty one when there is nothing new.

        `at_once` goes by the horizon of the read before, which saves a statement: what is settled stays settled,
        so the checkpoint only waits a little longer.
        """
        if not at_once:
            self._horizon = self._ask_horizon()
        last_position, settled = self._horizon
        beyond = self._rows(_BEYOND, self.frontier, self._batch_size)
        # Asked second: if a row beyond tells of an aggregate, the earlier event that committed before it
        # is visible by now and, sorted by position, is published before it.
        late = self._late()
        if len(late) == self._batch_size:
            # More have turned up in the holes than one batch takes. They go first.
            self._holes = without(self._holes, positions(late))
            return Batch(late, self.checkpoint)

        found = positions(beyond)
        full = len(beyond) == self._batch_size
        frontier = found[-1] if full else max(self.frontier, last_position, *found[-1:])
        still_missing = without(self._holes, positions(late))
        self._holes = above([*still_missing, *holes(self.frontier, frontier, found)], settled)
        self.frontier = frontier
        self.checkpoint = max(self.checkpoint, min(settled, frontier))
        return Batch([*late, *beyond], self.checkpoint)

    def is_full(self, batch: Batch) -> bool:
        """Return whether more may be waiting behind this batch."""
        return len(batch.rows) >= self._batch_size

    def rows_in(self, multirange: str) -> list[Row]:
        """Return the rows at exactly these positions, to publish a batch again as it was."""
        return self._rows(_IN_BATCHES, multirange)

    def _ask_horizon(self) -> tuple[int, int]:
        row = self._connection.execute("select last_position, settled from dovecote.horizon()").fetchone()
        assert row is not None
        return row[0], row[1]

    def _late(self) -> list[Row]:
        if not self._holes:
            return []
        return self._rows(
            _IN_HOLES,
            [hole.start for hole in self._holes],
            [hole.stop - 1 for hole in self._holes],
            self._batch_size,
            self._batch_size,
        )

    def _rows(self, query: str, *parameters: object) -> list[Row]:
        with self._connection.cursor(binary=True) as cursor:
            rows: list[Row] = cursor.execute(query, parameters).fetchall()
        return rows


def positions(rows: Sequence[Row]) -> list[int]:
    """Return the position of each row."""
    return [position for position, _, _ in rows]
