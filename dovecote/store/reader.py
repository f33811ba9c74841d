"""Read the outbox forward without missing a row.

Positions become visible out of order: a transaction that took position 7 may commit after 8 was read. So the reader
keeps two marks and what lies between them:

    checkpoint       everything at or below it was either read or will never exist
    high-water mark  the highest position that was looked for
    gaps             positions between the two that were not visible when their neighbours were read

Each read asks for rows above the high-water mark, and for rows that have appeared in the gaps of writers that have
ended (gaps.py). A slow writer keeps the checkpoint back and leaves a gap; it delays nobody else.
`dovecote.low_watermark()` returns the safe position, up to which no writer is left; it must be asked before the rows
are (docs/adr/0003-reading-forward.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from dovecote.store import gaps
from dovecote.store.envelopes import Connection as Connection
from dovecote.store.envelopes import Envelopes, Read, bounded
from dovecote.store.envelopes import Row as Row
from dovecote.store.positions import above, missing, multirange_of, together, without
from dovecote.store.published_batches import published_above
from dovecote.store.sequence import SequenceFault


@dataclass(frozen=True)
class Batch:
    """Rows in writing order. Once they are published or dead-lettered, everything up to `checkpoint` is.

    is_full   more rows may follow
    problems  position -> why the row there has no envelope
    """

    rows: Sequence[Row]
    checkpoint: int
    is_full: bool = False
    problems: Mapping[int, str] = field(default_factory=dict)


# As bytes: an envelope goes to Redis as it is, and decoding it would cost as much as all else done with it here.
_SELECT = "select o.position, o.event_type, o.id, dovecote.small_envelope(o) as envelope"
_BEYOND = bounded(f"{_SELECT} from dovecote.outbox o where o.position > %s order by o.position limit %s")
# Range by range: the planner would rather read the whole outbox in order and filter by the gaps.
_IN_GAPS = bounded(f"""
    {_SELECT}
    from unnest(%s::bigint[], %s::bigint[]) as stretch (low, high)
    cross join lateral (select * from dovecote.outbox where position between stretch.low and stretch.high
                          and position <@ %s::int8multirange order by position limit %s) o
    order by o.position limit %s
""")  # noqa: S608 - put together from constants
# From a position on: a batch may have more rows than one statement reads.
_IN_BATCHES = bounded(f"""
    {_SELECT}
    from unnest(%s::int8multirange * int8multirange(int8range(%s, null))) as stretch
    cross join lateral (select * from dovecote.outbox
                        where position >= lower(stretch) and position < upper(stretch) order by position) o
    order by o.position limit %s
""")  # noqa: S608 - put together from constants


class Reader:
    """Returns every committed event once.

    A new reader starts from the recorded checkpoint and learns from `published_batches` what was read above it.
    """

    def __init__(self, connection: Connection, checkpoint: int, batch_size: int, batch_bytes: int = 8_000_000) -> None:
        self._connection = connection
        self.envelopes = Envelopes(connection, batch_size, batch_bytes)
        self._batch_size = self.envelopes.max_rows
        # Live events keep a share of each batch, however large the late rows are.
        self._least_beyond_bytes = batch_bytes // 4
        self.checkpoint = self.high_water_mark = checkpoint
        self._watermark = (checkpoint, checkpoint)
        self._gaps: list[range] = []
        self._writers = gaps.Writers()
        # Gaps above this may belong to a writer that was never listed: they are always read. At first, all gaps are.
        self._unseen_above = 0
        for published in published_above(connection, checkpoint):
            upto = published.stop - 1
            if upto > self.high_water_mark:
                known = range(max(published.start, self.high_water_mark + 1), published.stop)
                self._gaps += missing(self.high_water_mark, upto, known)
                self.high_water_mark = upto

    def read(self, *, at_once: bool = False) -> Batch:
        """Return the next batch; an empty one when there is nothing new.

        `at_once` reuses the safe position of the read before, which saves a statement. A safe position stays safe, so
        the checkpoint only moves a little later.
        """
        if not at_once:
            self._watermark = self._read_watermark()
            self._writers.refresh(self._connection, are_any=self._watermark[1] < self._watermark[0])
        last_position, safe = self._watermark
        beyond = self.envelopes.read(_BEYOND, self.high_water_mark, self._batch_size)
        # Second: whatever committed before a row beyond is visible by now and, sorted by position, is published
        # before it. So the events of one aggregate stay in order.
        late = self._late()
        if late.rows:
            beyond = beyond.within(max(self.envelopes.max_bytes - late.bytes, self._least_beyond_bytes))
        if late.is_cut:
            return self._late_first(late, beyond)

        high_water_mark = self._next_high_water_mark(beyond)
        still_missing = without(self._gaps, positions(late.rows)) if late.rows else self._gaps
        new = missing(self.high_water_mark, high_water_mark, positions(beyond.rows))
        self._gaps = above([*still_missing, *new], safe)
        # A position above the sequence as it was read may belong to a writer that began after we listed the locks.
        self._unseen_above = last_position
        self.high_water_mark = high_water_mark
        self.checkpoint = max(self.checkpoint, min(safe, high_water_mark))
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
        """Yield the same rows one by one, including those that cannot be read."""
        return (row for read in self.slices_in(multirange) for row in read.rows)

    def _read_watermark(self) -> tuple[int, int]:
        row = self._connection.execute("select last_position, safe_position from dovecote.low_watermark()").fetchone()
        assert row is not None
        if row[0] < self._watermark[0]:
            raise SequenceFault(f"dovecote.outbox_position was set back from {self._watermark[0]} to {row[0]}")
        return row[0], row[1]

    def _next_high_water_mark(self, beyond: Read) -> int:
        if beyond.is_cut:  # what was left out is above the next mark
            return beyond.rows[-1][0] if beyond.rows else self.high_water_mark
        return max(self.high_water_mark, self._watermark[0], *positions(beyond.rows[-1:]))

    def _late(self) -> Read:
        """Return the rows that have appeared in gaps; only the gaps that an ended writer may have filled are read."""
        if not self._gaps:
            return Read([])
        low = self._unseen_above
        ended = self._lowest_mark_of_ended(low)
        while True:
            low = min(low, ended)
            late = self._in_gaps(above(self._gaps, low))
            # A writer that ended meanwhile may have left a row above that mark and an earlier row below it.
            if not late.rows or (ended := self._lowest_mark_of_ended(low)) >= low:
                return late

    def _lowest_mark_of_ended(self, low: int) -> int:
        """Return the given mark, or the lower one of a writer that has ended."""
        if self._gaps[0].start > low:
            return low
        ended = self._writers.lowest_mark_of_ended(self._connection)
        return low if ended is None else ended

    def _in_gaps(self, wanted: Sequence[range]) -> Read:
        if not wanted:
            return Read([])
        stretches = together(wanted)
        return self.envelopes.read(
            _IN_GAPS,
            [stretch.start for stretch in stretches],
            [stretch.stop - 1 for stretch in stretches],
            multirange_of(wanted),
            self._batch_size,
            self._batch_size,
        )

    def _late_first(self, late: Read, beyond: Read) -> Batch:
        """Return the late rows of a full batch, and those rows beyond that have no unread predecessor.

        More have appeared than fit into one batch, as after a large import. Rows beyond wait only for late rows of
        their own aggregate: such rows become gaps until then. The checkpoint stays.
        """
        high_water_mark = self._next_high_water_mark(beyond)
        self._gaps = without(self._gaps, positions(late.rows))
        # Nothing below the last late row is left that was visible when the rows beyond were read.
        behind = gaps.behind_unread(self._connection, positions(beyond.rows), above(self._gaps, late.rows[-1][0]))
        rows = [row for row in beyond.rows if row[0] not in behind]
        problems = {position: problem for position, problem in beyond.problems.items() if position not in behind}
        self._gaps += missing(self.high_water_mark, high_water_mark, positions(rows))
        self._unseen_above = 0  # the rest is visible already, whichever writer ends next
        self.high_water_mark = high_water_mark
        return Batch([*late.rows, *rows], self.checkpoint, True, {**late.problems, **problems})


class ReadAhead:
    """Reads the next batch of a backlog while the current one is on its way to Redis.

    Postgres makes the envelopes of one batch while this process cuts and sends the one before. Only a full batch is
    followed by another at once, so an event that comes alone is read when it comes and waits for nothing. The thread
    shares the leader's connection, which runs one statement at a time: other statements of the leader wait for it.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: Future[Batch] | None = None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def take(self, *, at_once: bool = False) -> Batch:
        """Return the next batch; `at_once` is for the reader. Errors: those of reading."""
        batch = self._next.result() if self._next else self._reader.read(at_once=at_once)
        self._next = self._thread.submit(self._reader.read) if batch.is_full else None
        return batch

    def wait(self) -> None:
        """Wait until nothing is being read and the connection is free."""
        if self._next:
            wait([self._next])


def positions(rows: Sequence[Row]) -> list[int]:
    """Return the position of each row."""
    return [position for position, _, _ in rows]
