"""The search for what Redis may have lost: published, but neither processed nor in `deliveries`.

Whole batches are cut into bundles exactly as they were when they were published first, so a bundle that is still queued
is not queued twice. They are sent in the order in which they were published, which is that of each aggregate.

The search begins at each handler's low-water mark and goes forward in steps: each statement reads a bounded number of
rows, and one step is in memory. Between statements the leader's session is seen to be alive.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from datetime import datetime
from itertools import groupby

from dovecote.broker.publisher import QueuedBundle
from dovecote.relay.bundler import Bundler
from dovecote.route import Route
from dovecote.store import progress, published_batches
from dovecote.store.envelopes import Read, Row
from dovecote.store.published_batches import PublishedBatch
from dovecote.store.reader import Connection, Reader
from dovecote.store.unsendable import Unreadable, report

# Events of one statement that asks what handlers have done.
_EXAMINED_EVENTS = 5_000


def _report(rows: Sequence[Unreadable]) -> None:
    report({row.position: row.problem for row in rows})


def bundles(
    connection: Connection,
    reader: Reader,
    bundler: Bundler,
    routes: Sequence[Route],
    record_unreadable: Callable[[Sequence[Unreadable]], None] = _report,
    upto: Mapping[str, int] | None = None,
) -> Iterator[QueuedBundle]:
    """Yield the messages to send again, batch by batch; to the handlers of `upto` only what lies up to there.

    Rows that cannot be read any more are given to `record_unreadable`. What is finished meanwhile is left out.
    """
    return _Search(connection, reader, bundler, routes, record_unreadable, upto or {}).bundles()


class _Search:
    def __init__(
        self,
        connection: Connection,
        reader: Reader,
        bundler: Bundler,
        routes: Sequence[Route],
        record_unreadable: Callable[[Sequence[Unreadable]], None],
        upto: Mapping[str, int],
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._bundler = bundler
        self._record_unreadable = record_unreadable
        self._upto = upto
        self._handlers = sorted({route.handler for route in routes})
        mark = reader.high_water_mark
        uptos = [(handler, min(mark, upto.get(handler, mark))) for handler in self._handlers]
        self._ranges = progress.open_ranges(connection, uptos)

    def bundles(self) -> Iterator[QueuedBundle]:
        began: datetime | None = None
        block = -1
        for step in published_batches.scan(self._connection, self._ranges):
            began = min((time for time in (began, step.first_published_at) if time), default=None)
            # The block that the step before ended in is sent already.
            for block in [one for one in step.blocks if one > block]:
                yield from self._of_batches([published_batches.block_of(self._connection, block)])
        if began is not None:
            batches = published_batches.batches_since(self._connection, began, self._ranges)
            for group in _groups(batches, _EXAMINED_EVENTS):
                yield from self._of_batches(group)

    def _of_batches(self, batches: Sequence[PublishedBatch]) -> Iterator[QueuedBundle]:
        """Yield the bundles of these batches with anything in them that is missing."""
        found = progress.unfinished(self._connection, self._handlers, published_batches.ranges_of(batches))
        if not found:
            return
        missing = {handler: frozenset(positions) for handler, positions in found.items()}
        for run in _runs(batches):
            for bundle, _ in cut(self._reader, self._bundler, run, missing, self._record_unreadable, self._upto):
                yield bundle


def cut(
    reader: Reader,
    bundler: Bundler,
    batches: Sequence[PublishedBatch],
    missing: Mapping[str, Set[int]],
    record_unreadable: Callable[[Sequence[Unreadable]], None],
    upto: Mapping[str, int] | None = None,
) -> Iterator[tuple[QueuedBundle, list[int]]]:
    """Yield the bundles with anything in them that is missing, and the positions in each, cut as they were first.

    Each batch lies above the one before. Missing rows that cannot be read are given to `record_unreadable`.
    """
    stops = [batch.stop for batch in batches]
    rows = _readable(reader.slices_in(published_batches.ranges_of(batches)), bundler, missing, record_unreadable)
    for _, its_rows in groupby(rows, lambda row: bisect_right(stops, row[0])):
        for bundle, inside in bundler.bundles_with_positions(its_rows, upto):
            if not missing.get(bundle.handler, frozenset()).isdisjoint(inside):
                yield bundle, inside


def _readable(
    slices: Iterable[Read],
    bundler: Bundler,
    missing: Mapping[str, Set[int]],
    record_unreadable: Callable[[Sequence[Unreadable]], None],
) -> Iterator[Row]:
    for found in slices:
        record_unreadable(
            [
                Unreadable(route.handler, position, found.problems[position])
                for position, event_type, _ in (found.rows if found.problems else ())
                if position in found.problems
                for route in bundler.routes_for(event_type)
                if position in missing.get(route.handler, ())
            ]
        )
        yield from found.rows


def _groups(batches: Iterable[PublishedBatch], events: int) -> Iterator[list[PublishedBatch]]:
    """Put batches together until they have so many events."""
    group: list[PublishedBatch] = []
    room = events
    for batch in batches:
        group.append(batch)
        room -= batch.events
        if room <= 0:
            yield group
            group, room = [], events
    if group:
        yield group


def _runs(batches: Sequence[PublishedBatch]) -> Iterator[list[PublishedBatch]]:
    """Put together what one statement reads in order: batches that follow each other, each above the one before."""
    run: list[PublishedBatch] = []
    for batch in batches:
        if run and batch.low < run[-1].stop:
            yield run
            run = []
        run.append(batch)
    if run:
        yield run
