"""Sets of positions as sorted, disjoint ranges: ten gaps in a day of events make eleven ranges."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

# Reading this many positions between two ranges is cheaper than another index search.
_NEAR = 32


def _last(stretch: range) -> int:
    return stretch.stop - 1


def missing(after: int, upto: int, positions: Sequence[int]) -> list[range]:
    """Return the positions in (after, upto] that are not among `positions`, which are sorted."""
    if positions and len(positions) == upto - after:
        return []  # the usual case, without a look at each
    found = []
    for position in (*positions, upto + 1):
        if position > after + 1:
            found.append(range(after + 1, position))
        after = position
    return found


def without(ranges: list[range], positions: Sequence[int]) -> list[range]:
    """Return the ranges without some positions, which are sorted. It touches only the ranges that change."""
    left: list[range] = []
    kept = taken = 0
    while taken < len(positions):
        at = bisect_left(ranges, positions[taken], kept, key=_last)
        if at == len(ranges):
            break
        stretch = ranges[at]
        left += ranges[kept:at]
        first = bisect_left(positions, stretch.start, taken)
        taken = bisect_left(positions, stretch.stop, first)
        left += missing(stretch.start - 1, stretch.stop - 1, positions[first:taken])
        kept = at + 1
    return left + ranges[kept:]


def above(ranges: list[range], position: int) -> list[range]:
    """Return what of the ranges lies above the position."""
    if not ranges or ranges[0].start > position:
        return ranges
    left = ranges[bisect_right(ranges, position, key=_last) :]
    if left and left[0].start <= position:
        left[0] = range(position + 1, left[0].stop)
    return left


def together(ranges: Sequence[range]) -> list[range]:
    """Return fewer ranges that contain all of these: neighbours, and what is between them, become one."""
    found: list[range] = []
    for stretch in ranges:
        if found and stretch.start - found[-1].stop <= _NEAR:
            found[-1] = range(found[-1].start, stretch.stop)
        else:
            found.append(stretch)
    return found


def multirange_of(ranges: Sequence[range]) -> str:
    """Return ranges as a Postgres int8multirange literal."""
    return "{" + ",".join([f"[{stretch.start},{stretch.stop})" for stretch in ranges]) + "}"


def multirange(positions: Sequence[int]) -> str:
    """Return sorted positions as a Postgres int8multirange literal: [1, 2, 3, 7] is {[1,4),[7,8)}."""
    stretches: list[list[int]] = []
    for position in positions:
        if stretches and stretches[-1][1] == position:
            stretches[-1][1] = position + 1
        else:
            stretches.append([position, position + 1])
    return "{" + ",".join(f"[{start},{stop})" for start, stop in stretches) + "}"
