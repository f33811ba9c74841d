"""Sets of positions as sorted, disjoint ranges: a day of events with ten holes is eleven ranges."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence


def holes(after: int, upto: int, positions: Sequence[int]) -> list[range]:
    """Return the positions in (after, upto] that are not among `positions`, which are sorted."""
    if positions and len(positions) == upto - after:
        return []  # the usual case, without a look at each
    found = []
    for position in (*positions, upto + 1):
        if position > after + 1:
            found.append(range(after + 1, position))
        after = position
    return found


def without(ranges: Iterable[range], positions: Sequence[int]) -> list[range]:
    """Return the ranges less some positions, which are sorted."""
    left = []
    for stretch in ranges:
        inside = positions[bisect_left(positions, stretch.start) : bisect_left(positions, stretch.stop)]
        left += holes(stretch.start - 1, stretch.stop - 1, inside)
    return left


def above(ranges: Iterable[range], floor: int) -> list[range]:
    """Return what of the ranges lies above the floor."""
    return [range(max(stretch.start, floor + 1), stretch.stop) for stretch in ranges if stretch.stop > floor + 1]


def multirange(positions: Sequence[int]) -> str:
    """Return sorted positions as a Postgres int8multirange literal: [1, 2, 3, 7] is {[1,4),[7,8)}."""
    stretches: list[list[int]] = []
    for position in positions:
        if stretches and stretches[-1][1] == position:
            stretches[-1][1] = position + 1
        else:
            stretches.append([position, position + 1])
    return "{" + ",".join(f"[{start},{stop})" for start, stop in stretches) + "}"
