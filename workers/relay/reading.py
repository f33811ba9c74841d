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
from typing import NamedTuple

import psycopg
from psycopg.adapt import Loader
from psycopg.rows import TupleRow

from workers.relay.positions import above, holes, without

Connection = psycopg.Connection[TupleRow]


class Row(NamedTuple):
    """One event; `envelope` is its CloudEvents JSON in UTF-8."""

    position: int
    event_type: str
    envelope: bytes


@dataclass(frozen=True)
class Batch:
    """Rows in writing order. Once they are published, everything up to `checkpoint` is."""

    rows: Sequence[Row]
    checkpoint: int


_SELECT = "select o.position, o.event_type, dovecote.envelope(o) from dovecote.outbox o"
_BEYOND = f"{_SELECT} where o.position > %s order by o.position limit %s"
# Hole by hole: the planner would rather read the whole outbox in order and throw away what is in none.
_IN_HOLES = """
    select o.position, o.event_type, dovecote.envelope(o)
    from unnest(%s::bigint[], %s::bigint[]) as hole (low, high)
    cross join lateral (select * from dovecote.outbox where position between hole.low and hole.high
                        order by position limit %s) o
    order by o.position limit %s
"""
_IN_BATCHES = """
    select o.position, o.event_type, dovecote.envelope(o)
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
        self._holes: list[range] = []
        for start, stop in connection.execute(_PUBLISHED_ABOVE, {"checkpoint": checkpoint}):
            if stop - 1 > self.frontier:
                self._holes += holes(self.frontier, stop - 1, range(max(start, self.frontier + 1), stop))
                self.frontier = stop - 1

    def read(self) -> Batch:
        """Return the next batch; an empty one when there is nothing new."""
        last_position, settled = self._horizon()
        beyond = self._rows(_BEYOND, self.frontier, self._batch_size)
        # Asked second: if a row beyond tells of an aggregate, the earlier event that committed before it
        # is visible by now and, sorted by position, is published before it.
        late = self._late()
        if len(late) == self._batch_size:
            # More have turned up in the holes than one batch takes. They go first.
            self._holes = without(self._holes, [row.position for row in late])
            return Batch(late, self.checkpoint)

        positions = [row.position for row in beyond]
        if len(beyond) == self._batch_size:
            frontier = positions[-1]
        else:
            frontier = max(self.frontier, last_position, *positions[-1:])
        found = without(self._holes, [row.position for row in late])
        self._holes = above([*found, *holes(self.frontier, frontier, positions)], settled)
        self.frontier = frontier
        self.checkpoint = max(self.checkpoint, min(settled, frontier))
        return Batch([*late, *beyond], self.checkpoint)

    def rows_in(self, multirange: str) -> list[Row]:
        """Return the rows at exactly these positions, to publish a batch again as it was."""
        return self._rows(_IN_BATCHES, multirange)

    def _horizon(self) -> tuple[int, int]:
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
        with self._connection.cursor() as cursor:
            cursor.adapters.register_loader("text", _Utf8)
            found = cursor.execute(query, parameters).fetchall()
        return [Row(position, event_type.decode(), envelope) for position, event_type, envelope in found]


class _Utf8(Loader):
    """Text as the bytes it came in: an envelope goes to Redis as it is."""

    def load(self, data: psycopg.abc.Buffer) -> bytes:
        return bytes(data)
