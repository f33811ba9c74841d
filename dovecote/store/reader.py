"""Read the outbox forward without losing anyone.

Positions become visible out of order: a transaction that took position 7 may commit after 8 was read.
So the reader keeps two marks and what lies between them:

    checkpoint   everything at or below it is settled: committed and read, or gone for ever
    frontier     the highest position looked at
    holes        positions between the two that were not there yet when their neighbours were read

Each read asks for rows above the frontier, and for rows that have turned up in the holes where a writer that could
fill them is over (gaps.py). A writer that dawdles keeps the checkpoint back and leaves a hole; it delays nobody else.
`dovecote.horizon()` says how far everything is settled; it must be asked before the rows are
(docs/adr/0003-reading-forward.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dovecote.store import gaps
from dovecote.store.envelopes import Connection as Connection
from dovecote.store.envelopes import Envelopes, Read, bounded
from dovecote.store.envelopes import Row as Row
from dovecote.store.positions import above, holes, multirange_of, together, without
from dovecote.store.sequence import SequenceFault


@dataclass(frozen=True)
class Batch:
    """Rows in writing order. Once they are published or set aside, everything up to `checkpoint` is.

    is_full   more may be waiting behind it
    problems  position -> why the row there has no envelope
    """

    rows: Sequence[Row]
    checkpoint: int
    is_full: bool = False
    problems: Mapping[int, str] = field(default_factory=dict)


# As bytes: an envelope goes to Redis as it is, and decoding it would cost as much as all else done with it here.
_SELECT = "select o.position, o.event_type, o.id, dovecote.small_envelope(o) as envelope"
_BEYOND = bounded(f"{_SELECT} from dovecote.outbox o where o.position > %s order by o.position limit %s")
# Stretch by stretch: the planner would rather read the whole outbox in order and throw away what is in no hole.
_IN_HOLES = bounded(f"""
    {_SELECT}
    from unnest(%s::bigint[], %s::bigint[]) as stretch (low, high)
    cross join lateral (select * from dovecote.outbox where position between stretch.low and stretch.high
                          and position <@ %s::int8multirange order by position limit %s) o
    order by o.position limit %s
""")  # noqa: S608 - put together from constants
# From a position on: a batch may be more than is read at once.
_IN_BATCHES = bounded(f"""
    {_SELECT}
    from unnest(%s::int8multirange * int8multirange(int8range(%s, null))) as stretch
    cross join lateral (select * from dovecote.outbox
                        where position >= lower(stretch) and position < upper(stretch) order by position) o
    order by o.position limit %s
""")  # noqa: S608 - put together from constants

# A row without an end was written by no relay. What it hides would be published by nobody.
_PUBLISHED_ABOVE = """
    select lower(stretch), upper(stretch)
    from (select unnest(range_agg(positions)) from dovecote.published_batches
          where positions && int8multirange(int8range(%(checkpoint)s, null, '()'))
            and not lower_inf(positions) and not upper_inf(positions)) as published (stretch)
    order by 1
"""


class Reader:
    """Hands out every committed event at least once, and no event twice.

    A new reader starts from the recorded checkpoint and knows from `published_batches` what was handed
    out above it.
    """

    def __init__(self, connection: Connection, checkpoint: int, batch_size: int, batch_bytes: int = 8_000_000) -> None:
        self._connection = connection
        self.envelopes = Envelopes(connection, batch_size, batch_bytes)
        self._batch_size = self.envelopes.most_rows
        # Live events go along with late rows, however large those are.
        self._least_beyond_bytes = batch_bytes // 4
        self.checkpoint = self.frontier = checkpoint
        self._horizon = (checkpoint, checkpoint)
        self._holes: list[range] = []
        self._writers = gaps.Writers()
        # Above this a hole may be of a writer that no look has shown: it is looked into whoever is over. All, at first.
        self._unseen_above = 0
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
            self._writers.look(self._connection, at_any=self._horizon[1] < self._horizon[0])
        last_position, settled = self._horizon
        beyond = self.envelopes.read(_BEYOND, self.frontier, self._batch_size)
        # Asked second: if a row beyond tells of an aggregate, the earlier event that committed before it
        # is visible by now and, sorted by position, is published before it.
        late = self._late()
        if late.rows:
            beyond = beyond.within(max(self.envelopes.most_bytes - late.bytes, self._least_beyond_bytes))
        if late.is_cut:
            return self._late_first(late, beyond)

        frontier = self._next_frontier(beyond)
        still_missing = without(self._holes, positions(late.rows)) if late.rows else self._holes
        self._holes = above([*still_missing, *holes(self.frontier, frontier, positions(beyond.rows))], settled)
        # A position above the sequence as it was read may be of a writer that is younger than our look at the locks.
        self._unseen_above = last_position
        self.frontier = frontier
        self.checkpoint = max(self.checkpoint, min(settled, frontier))
        return Batch([*late.rows, *beyond.rows], self.checkpoint, beyond.is_cut, {**late.problems, **beyond.problems})

    def slices_in(self, multirange: str) -> Iterator[Read]:
        """Yield the rows at exactly these positions, to publish a batch again as it was."""
        start = 0
        while True:
            read = self.envelopes.read(_IN_BATCHES, multirange, start, self._batch_size)
            yield read
            if not read.is_cut:
                return
            start = read.rows[-1][0] + 1

    def rows_in(self, multirange: str) -> Iterator[Row]:
        """Yield them one by one, those that cannot be read among them."""
        return (row for read in self.slices_in(multirange) for row in read.rows)

    def _ask_horizon(self) -> tuple[int, int]:
        row = self._connection.execute("select last_position, settled from dovecote.horizon()").fetchone()
        assert row is not None
        if row[0] < self._horizon[0]:
            raise SequenceFault(f"dovecote.outbox_position was set back from {self._horizon[0]} to {row[0]}")
        return row[0], row[1]

    def _next_frontier(self, beyond: Read) -> int:
        if beyond.is_cut:  # what was left out is beyond the next frontier
            return beyond.rows[-1][0] if beyond.rows else self.frontier
        return max(self.frontier, self._horizon[0], *positions(beyond.rows[-1:]))

    def _late(self) -> Read:
        """Return what has turned up in holes: only there is looked where a writer that is over may have left it."""
        if not self._holes:
            return Read([])
        floor = self._unseen_above
        ended = self._lowest_floor_of_ended(floor)
        while True:
            floor = min(floor, ended)
            late = self._in_holes(above(self._holes, floor))
            # A writer that ended in between may have left a row above that floor and an earlier one below it.
            if not late.rows or (ended := self._lowest_floor_of_ended(floor)) >= floor:
                return late

    def _lowest_floor_of_ended(self, floor: int) -> int:
        """Return the given floor, or a lower one where a hole below it may have been filled."""
        if self._holes[0].start > floor:
            return floor
        ended = self._writers.lowest_floor_of_ended(self._connection)
        return floor if ended is None else ended

    def _in_holes(self, wanted: Sequence[range]) -> Read:
        if not wanted:
            return Read([])
        stretches = together(wanted)
        return self.envelopes.read(
            _IN_HOLES,
            [stretch.start for stretch in stretches],
            [stretch.stop - 1 for stretch in stretches],
            multirange_of(wanted),
            self._batch_size,
            self._batch_size,
        )

    def _late_first(self, late: Read, beyond: Read) -> Batch:
        """Return the late rows of a full batch, and with them those beyond that follow on nothing unread.

        More have turned up than one batch takes, such as those of a large import. Rows beyond need not wait for
        them, only for what is of their own aggregate: such rows become holes until then. The checkpoint stays.
        """
        frontier = self._next_frontier(beyond)
        self._holes = without(self._holes, positions(late.rows))
        # Below the last late row nothing is left that was there when the rows beyond were.
        behind = gaps.behind_unread(self._connection, positions(beyond.rows), above(self._holes, late.rows[-1][0]))
        rows = [row for row in beyond.rows if row[0] not in behind]
        problems = {position: problem for position, problem in beyond.problems.items() if position not in behind}
        self._holes += holes(self.frontier, frontier, positions(rows))
        self._unseen_above = 0  # the rest is there already, whoever is over next
        self.frontier = frontier
        return Batch([*late.rows, *rows], self.checkpoint, True, {**late.problems, **problems})


def positions(rows: Sequence[Row]) -> list[int]:
    """Return the position of each row."""
    return [position for position, _, _ in rows]


def outbox_run(connection: Connection) -> str:
    """Return in which run of Postgres, and of which outbox, this session reads."""
    (run,) = connection.execute("select dovecote.outbox_run()").fetchone() or ("",)
    return str(run)
