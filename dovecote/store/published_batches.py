"""The table `published_batches`: exactly which positions were published together, and when.

A range without bounds in it was written by no relay. It is ignored: positions that it covers would never be published.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from dovecote.store.envelopes import Connection

# Events of one statement that scans for positions only.
_SCANNED_EVENTS = 20_000
_BATCHES = 1_000
# Positions in no batch are sent in blocks of so many positions, whatever the settings say: a second try after a crash
# cuts the same bundles.
_BLOCK = 2_000

# Nothing is recorded by a relay that has been replaced: its epoch matches no row any more. The row is locked, which
# reads its newest version, and not written: each version would be read by the next batches for as long as anybody in
# the database holds a snapshot. The checkpoint follows once a second; what is published above it, a new reader learns
# from this table.
RECORD = """
    insert into dovecote.published_batches (positions, events, epoch)
    select %(positions)s::int8multirange, %(events)s, owner.epoch
    from (select epoch from dovecote.relay_state where epoch = %(epoch)s for no key update) as owner
"""

_ABOVE = """
    select lower(stretch), upper(stretch)
    from (select unnest(range_agg(positions)) from dovecote.published_batches
          where positions && int8multirange(int8range(%(checkpoint)s, null, '()'))
            and not lower_inf(positions) and not upper_inf(positions)) as published (stretch)
    order by 1
"""

# Of the next events of the ranges: how far they go, when the first of their batches was published, and the blocks with
# a position that no batch has, although the checkpoint has passed it: it was written while the sequence was behind.
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

# Of the next batches those that reach into the ranges, and the last one: the next statement goes on after it.
_NEXT_BATCHES = """
    with next as materialized (
        select published_at, positions, events from dovecote.published_batches
        where published_at >= %(since)s and (published_at, positions) > (%(since)s, %(positions)s::int8multirange)
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

# Of these positions, what was published long enough ago. A position in no batch that the checkpoint has passed was
# written while the sequence was behind: its own age counts.
_PUBLISHED_LONG_AGO = """
    with candidate as materialized (
        select o.position, o.id, o.created_at
        from unnest(%(positions)s::bigint[]) as m (position) join dovecote.outbox o on o.position = m.position
    ), batch as materialized (
        select b.positions, b.published_at < clock_timestamp() - make_interval(secs => %(seconds)s) as is_old
        from dovecote.published_batches b
        where b.positions && (select range_agg(int8range(position, position, '[]')) from candidate)
    ), published as materialized (
        select coalesce(range_agg(positions), '{}') as ever,
               coalesce(range_agg(positions) filter (where not is_old), '{}') as lately
        from batch
    )
    select c.position, c.id from candidate c cross join published p
    where not p.lately @> c.position
      and (p.ever @> c.position
           or c.position <= (select checkpoint from dovecote.relay_state)
              and c.created_at < clock_timestamp() - make_interval(secs => %(seconds)s))
    order by c.position
"""


@dataclass(frozen=True)
class PublishedBatch:
    """What was published together: its exact positions as a multirange, from `low` up to but not including `stop`."""

    positions: str
    events: int
    low: int
    stop: int


@dataclass(frozen=True)
class Scanned:
    """A step of `scan`: when its first batch was published, if any, and the blocks with positions in no batch."""

    first_published_at: datetime | None
    blocks: Sequence[int]


def record(connection: Connection, epoch: int, positions: str, events: int) -> int:
    """Record a batch; return 1, or 0 where another relay has taken over."""
    return connection.execute(RECORD, {"epoch": epoch, "positions": positions, "events": events}).rowcount


def published_above(connection: Connection, checkpoint: int) -> Iterator[range]:
    """Yield the ranges above the checkpoint that are published, in order."""
    for start, stop in connection.execute(_ABOVE, {"checkpoint": checkpoint}):
        yield range(start, stop)


def scan(connection: Connection, ranges: str) -> Iterator[Scanned]:
    """Go through the events in these ranges step by step; each statement reads a bounded number of rows."""
    after, events = -1, _SCANNED_EVENTS
    while events == _SCANNED_EVENTS:
        fields = {"ranges": ranges, "after": after, "events": _SCANNED_EVENTS}
        after, events, began, blocks = _one(connection, _SCAN, fields)
        yield Scanned(began, blocks)


def batches_since(connection: Connection, since: datetime, ranges: str) -> Iterator[PublishedBatch]:
    """Yield the batches that were published from then on and overlap the ranges, in order, each once."""
    positions, is_full = "{}", True
    while is_full:
        fields = {"since": since, "positions": positions, "ranges": ranges, "batches": _BATCHES}
        found = connection.execute(_NEXT_BATCHES, fields).fetchall()
        yield from (PublishedBatch(*batch) for _, *batch, overlaps, _ in found if overlaps)
        is_full = bool(found) and found[-1][-1]
        if is_full:
            since, positions, *_ = found[-1]


def batches_of(connection: Connection, positions: Sequence[int]) -> list[PublishedBatch]:
    """Return the batches that contain these positions, in the order in which they were published."""
    return [PublishedBatch(*row) for row in connection.execute(_BATCHES_OF, (list(positions),))]


def batches_and_blocks_of(connection: Connection, positions: Sequence[int]) -> list[PublishedBatch]:
    """Return the batches that contain these positions, and the blocks of those positions that are in no batch."""
    batches = batches_of(connection, positions)
    blocks = connection.execute(_BLOCKS, {"positions": list(positions), "known": [one.positions for one in batches]})
    return [*batches, *(block_of(connection, block) for (block,) in blocks.fetchall())]


def block_of(connection: Connection, block: int) -> PublishedBatch:
    """Return what of a block of positions is in no batch."""
    (text,) = _one(connection, _IN_NO_BATCH, {"block": block})
    return PublishedBatch(text or "{}", _BLOCK, block * _BLOCK, (block + 1) * _BLOCK)


def published_long_ago(connection: Connection, positions: Sequence[int], seconds: float) -> dict[int, UUID]:
    """Return those of the positions that were published longer ago, with their events, in order."""
    fields = {"positions": list(positions), "seconds": seconds}
    return dict(connection.execute(_PUBLISHED_LONG_AGO, fields).fetchall())


def ranges_of(batches: Sequence[PublishedBatch]) -> str:
    """Return the positions of all these batches as a multirange literal."""
    return "{" + ",".join(batch.positions[1:-1] for batch in batches if batch.positions != "{}") + "}"


def _one(connection: Connection, statement: str, fields: Mapping[str, object]) -> Any:
    row = connection.execute(statement, fields).fetchone()
    assert row is not None, "a query for one row"
    return row
