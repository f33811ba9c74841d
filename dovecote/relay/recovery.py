"""What Redis may have lost: published, but neither processed nor in `deliveries`.

Whole batches are cut into bundles exactly as they were when they were published first, so a bundle that is still queued
is not queued twice. They are sent in the order they were published, which is that of each aggregate.

The search begins at each handler's low-water mark and goes forward in steps: each statement reads a bounded number of
rows, and what is held is one step. A standby that looks at the leader's session sees it at work.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any

from dovecote.broker.broker import QueuedBundle
from dovecote.relay.bundler import Bundler
from dovecote.route import Route
from dovecote.store.envelopes import Read, Row
from dovecote.store.reader import Connection, Reader
from dovecote.store.unsendable import Unreadable, report

# Events of one statement that looks for positions only, and of one that asks what handlers have done.
_SCANNED_EVENTS, _LOOKED_AT_EVENTS = 20_000, 5_000
_BATCHES = 1_000
# Positions in no batch are sent in blocks of so many positions, whatever the settings say: a second try after a crash
# cuts the same bundles.
_BLOCK = 2_000
# More than a batch can have (DOVECOTE_RELAY__BATCH_SIZE): the positions are the bound.
_ALL = 1_000_000

# Where anything can be missing: in what is open, and above what was examined. `published_above` of a new handler is
# excluded with the events themselves.
_OPEN = """
    select coalesce(range_agg(part.ranges), '{}')::text
    from unnest(%(handlers)s::text[], %(uptos)s::bigint[]) as wanted (handler, upto)
    left join dovecote.progress p on p.handler_name = wanted.handler
    left join lateral (select min(since_position) as since from dovecote.subscriptions
                       where handler_name = wanted.handler) s on true
    cross join lateral (
        select (coalesce(p.open, '{}') + int8multirange(int8range(coalesce(p.examined, s.since), null, '()')))
               * int8multirange(int8range(null, wanted.upto, '(]')) as ranges) as part
    where coalesce(p.examined, s.since) is not null
"""

# Of the next events of the ranges: how far they go, when the first of their batches was published, and the blocks with
# a position that no batch has, though the checkpoint has passed it: it was written while the sequence was behind.
_SCAN = f"""
    with look as materialized (
        select * from dovecote.events_in(%(ranges)s::int8multirange
                                         * int8multirange(int8range(%(after)s, null, '()')), %(events)s)
    ), published as materialized (
        select range_agg(b.positions) as positions, min(b.published_at) as began
        from look join dovecote.published_batches b
            on b.positions && (%(ranges)s::int8multirange * int8multirange(int8range(%(after)s, look.upto, '(]')))
            and cardinality(look.positions) > 0
    )
    select look.upto, cardinality(look.positions), published.began,
           array(select distinct found.position / {_BLOCK} from unnest(look.positions) as found (position)
                 where found.position <= (select checkpoint from dovecote.relay_state)
                   and not coalesce(published.positions @> found.position, false) order by 1)
    from look cross join published
"""  # noqa: S608 - put together from constants

_IN_NO_BATCH = f"""
    select range_agg(int8range(o.position, o.position, '[]'))::text
    from dovecote.outbox o
    where o.position >= %(block)s * {_BLOCK} and o.position < (%(block)s + 1) * {_BLOCK}
      and o.position <= (select checkpoint from dovecote.relay_state)
      and not exists (select from dovecote.published_batches b where b.positions @> o.position)
"""  # noqa: S608 - put together from constants

# Of the next batches those that reach into the ranges, and the last one: the next statement goes on behind it.
_NEXT_BATCHES = """
    with next as materialized (
        select published_at, positions, events from dovecote.published_batches
        where published_at >= %(moment)s and (published_at, positions) > (%(moment)s, %(positions)s::int8multirange)
          and not lower_inf(positions) and not upper_inf(positions)
        order by published_at, positions limit %(batches)s
    ), last as (
        select published_at, positions from next order by published_at desc, positions desc limit 1
    )
    select next.published_at, next.positions::text, next.events, lower(next.positions), upper(next.positions),
           next.positions && %(ranges)s::int8multirange, (select count(*) from next) = %(batches)s
    from next cross join last
    where next.positions && %(ranges)s::int8multirange or next.positions = last.positions
    order by next.published_at, next.positions
"""

# What handlers have not settled of the first events in these ranges. dovecote.unsettled_of returns ranges, in which
# there may be events that a handler does not want, and counts versions that it does not know yet.
_UNSETTLED = """
    with look as materialized (
        select * from dovecote.events_in(
            %(ranges)s::int8multirange * int8multirange(int8range(%(begin)s, null)), %(events)s)
    ), unsettled as materialized (
        select u.handler_name, u.ranges from look
        cross join lateral dovecote.unsettled_of(%(handlers)s::text[], look.positions, look.ids, look.types) u
    ), wanted as materialized (
        select s.handler_name, s.event_type, s.since_position, s.published_above, u.ranges
        from unsettled u join dovecote.subscriptions s on s.handler_name = u.handler_name
    )
    select w.handler_name, array_agg(found.position order by found.position)
    from look
    cross join lateral unnest(look.positions, look.types) as found (position, event_type)
    join wanted w on w.event_type = found.event_type
    where w.ranges @> found.position and found.position > w.since_position
      and not w.published_above @> found.position
    group by 1
"""

_BATCHES_OF = """
    select distinct on (b.published_at, b.positions) b.positions::text, b.events, lower(b.positions), upper(b.positions)
    from dovecote.published_batches b
    where b.positions && (select range_agg(int8range(position, position, '[]'))
                          from unnest(%s::bigint[]) as missing (position))
      and not lower_inf(b.positions) and not upper_inf(b.positions)
    order by b.published_at, b.positions
"""

_BLOCKS = f"""
    select distinct position / {_BLOCK} from unnest(%(positions)s::bigint[]) as missing (position)
    where not (select coalesce(range_agg(known.positions), '{{}}')
               from unnest(%(known)s::int8multirange[]) as known (positions)) @> position
    order by 1
"""  # noqa: S608 - put together from constants


@dataclass(frozen=True)
class Published:
    """What was published together: its exact positions as a multirange, from `low` up to but not including `stop`."""

    positions: str
    events: int
    low: int
    stop: int


def _report(rows: Sequence[Unreadable]) -> None:
    report({row.position: row.problem for row in rows})


def bundles(
    connection: Connection,
    reader: Reader,
    bundler: Bundler,
    routes: Sequence[Route],
    set_aside: Callable[[Sequence[Unreadable]], None] = _report,
    upto: Mapping[str, int] | None = None,
) -> Iterator[QueuedBundle]:
    """Yield the messages to send again, batch by batch; to the handlers of `upto` only what lies up to there.

    Rows that cannot be read any more are given to `set_aside`. What turns out to be done meanwhile is left out.
    """
    return _Search(connection, reader, bundler, routes, set_aside, upto or {}).bundles()


class _Search:
    def __init__(
        self,
        connection: Connection,
        reader: Reader,
        bundler: Bundler,
        routes: Sequence[Route],
        set_aside: Callable[[Sequence[Unreadable]], None],
        upto: Mapping[str, int],
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._bundler = bundler
        self._set_aside = set_aside
        self._upto = upto
        self._handlers = sorted({route.handler for route in routes})
        self._ranges = self._open_ranges()

    def bundles(self) -> Iterator[QueuedBundle]:
        began: datetime | None = None
        block = -1
        for first_published, blocks in self._scan():
            began = min((moment for moment in (began, first_published) if moment), default=None)
            # The block that the step before ended in is sent already.
            for block in [one for one in blocks if one > block]:
                yield from self._of_batches([_in_no_batch(self._connection, block)])
        if began is not None:
            for group in _groups(self._batches_since(began), _LOOKED_AT_EVENTS):
                yield from self._of_batches(group)

    def _open_ranges(self) -> str:
        uptos = [
            min(self._reader.high_water_mark, self._upto.get(name, self._reader.high_water_mark))
            for name in self._handlers
        ]
        (text,) = _one(self._connection, _OPEN, {"handlers": self._handlers, "uptos": uptos})
        return str(text)

    def _scan(self) -> Iterator[tuple[datetime | None, list[int]]]:
        """Yield, step by step, when the first batch was published, and the blocks with positions in no batch."""
        after, events = -1, _SCANNED_EVENTS
        while events == _SCANNED_EVENTS:
            fields = {"ranges": self._ranges, "after": after, "events": _SCANNED_EVENTS}
            after, events, began, blocks = _one(self._connection, _SCAN, fields)
            yield began, blocks

    def _batches_since(self, moment: datetime) -> Iterator[Published]:
        """Yield what was published from then on and has anything open in it, in order, each once."""
        positions, is_full = "{}", True
        while is_full:
            fields = {"moment": moment, "positions": positions, "ranges": self._ranges, "batches": _BATCHES}
            found = self._connection.execute(_NEXT_BATCHES, fields).fetchall()
            yield from (Published(*batch) for _, *batch, is_open, _ in found if is_open)
            is_full = bool(found) and found[-1][-1]
            if is_full:
                moment, positions, *_ = found[-1]

    def _of_batches(self, batches: Sequence[Published]) -> Iterator[QueuedBundle]:
        """Yield the bundles of these batches with anything in them that is missing."""
        found = unsettled(self._connection, self._handlers, _ranges_of(batches))
        if not found:
            return
        missing = {handler: frozenset(positions) for handler, positions in found.items()}
        for run in _runs(batches):
            for bundle, _ in cut(self._reader, self._bundler, run, missing, self._set_aside, self._upto):
                yield bundle


def unsettled(
    connection: Connection, handlers: Sequence[str], ranges: str, begin: int = 0, events: int = _ALL
) -> dict[str, list[int]]:
    """Return what the handlers want and have not settled of the first so many events in these ranges, in order.

    `ranges` is a multirange literal, of which only what is at `begin` and above counts. A handler with nothing is not
    in the answer.
    """
    fields = {"handlers": list(handlers), "ranges": ranges, "begin": begin, "events": events}
    return dict(connection.execute(_UNSETTLED, fields).fetchall())


def cut(
    reader: Reader,
    bundler: Bundler,
    batches: Sequence[Published],
    missing: Mapping[str, Set[int]],
    set_aside: Callable[[Sequence[Unreadable]], None],
    upto: Mapping[str, int] | None = None,
) -> Iterator[tuple[QueuedBundle, list[int]]]:
    """Yield the bundles with anything in them that is missing, and the positions in each, cut as they were first.

    Each of the batches lies above the one before. Rows that are missing and cannot be read are given to `set_aside`.
    """
    stops = [batch.stop for batch in batches]
    rows = _readable(reader.slices_in(_ranges_of(batches)), bundler, missing, set_aside)
    for _, its_rows in groupby(rows, lambda row: bisect_right(stops, row[0])):
        for bundle, inside in bundler.bundles_with_positions(its_rows, upto):
            if not missing.get(bundle.handler, frozenset()).isdisjoint(inside):
                yield bundle, inside


def batches_of(connection: Connection, positions: Sequence[int]) -> list[str]:
    """Return the batches that brought these positions, as multiranges, in the order they were published."""
    return [batch.positions for batch in _batches_with(connection, positions)]


def batches_to_cut(connection: Connection, positions: Sequence[int]) -> list[Published]:
    """Return what these positions are to be cut with: their batches, and a block for those that are in none."""
    batches = _batches_with(connection, positions)
    blocks = connection.execute(_BLOCKS, {"positions": list(positions), "known": [one.positions for one in batches]})
    return [*batches, *(_in_no_batch(connection, block) for (block,) in blocks.fetchall())]


def _batches_with(connection: Connection, positions: Sequence[int]) -> list[Published]:
    return [Published(*row) for row in connection.execute(_BATCHES_OF, (list(positions),))]


def _in_no_batch(connection: Connection, block: int) -> Published:
    (text,) = _one(connection, _IN_NO_BATCH, {"block": block})
    return Published(text or "{}", _BLOCK, block * _BLOCK, (block + 1) * _BLOCK)


def _readable(
    slices: Iterable[Read],
    bundler: Bundler,
    missing: Mapping[str, Set[int]],
    set_aside: Callable[[Sequence[Unreadable]], None],
) -> Iterator[Row]:
    for found in slices:
        set_aside(
            [
                Unreadable(route.handler, position, found.problems[position])
                for position, event_type, _ in (found.rows if found.problems else ())
                if position in found.problems
                for route in bundler.routes_for(event_type)
                if position in missing.get(route.handler, ())
            ]
        )
        yield from found.rows


def _ranges_of(batches: Sequence[Published]) -> str:
    return "{" + ",".join(batch.positions[1:-1] for batch in batches if batch.positions != "{}") + "}"


def _groups(batches: Iterable[Published], events: int) -> Iterator[list[Published]]:
    """Put batches together until they have so many events."""
    group: list[Published] = []
    room = events
    for batch in batches:
        group.append(batch)
        room -= batch.events
        if room <= 0:
            yield group
            group, room = [], events
    if group:
        yield group


def _runs(batches: Sequence[Published]) -> Iterator[list[Published]]:
    """Put together what one statement reads in order: batches that follow each other, each above the one before."""
    run: list[Published] = []
    for batch in batches:
        if run and batch.low < run[-1].stop:
            yield run
            run = []
        run.append(batch)
    if run:
        yield run


def _one(connection: Connection, statement: str, fields: Mapping[str, object]) -> Any:
    row = connection.execute(statement, fields).fetchone()
    assert row is not None, "a query for one row"
    return row
