"""Sorted ranges of positions do what plain sets of them would."""

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dovecote.store.positions import above, missing, multirange, without

positions = st.sets(st.integers(1, 60)).map(sorted)


def numbers_in(ranges: Iterable[range]) -> list[int]:
    return [number for stretch in ranges for number in stretch]


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[range]:
    marks = sorted(draw(st.sets(st.integers(1, 60), max_size=12)))
    return [range(start, stop) for start, stop in zip(marks[::2], marks[1::2], strict=False)]


@given(positions, st.integers(0, 30), st.integers(0, 30))
def test_gaps_are_the_positions_that_are_not_there(there: list[int], after: int, length: int) -> None:
    upto = after + length
    seen = [position for position in there if after < position <= upto]

    found = missing(after, upto, seen)

    assert numbers_in(found) == sorted(set(range(after + 1, upto + 1)) - set(seen))
    assert all(found), "an empty range is no gap"


@given(disjoint_ranges(), positions)
def test_without_takes_positions_out_of_ranges(ranges: list[range], taken: list[int]) -> None:
    left = without(ranges, taken)

    assert numbers_in(left) == sorted(set(numbers_in(ranges)) - set(taken))
    assert all(left)


@given(disjoint_ranges(), st.integers(0, 61))
def test_above_keeps_what_lies_above_the_bound(ranges: list[range], bound: int) -> None:
    left = above(ranges, bound)

    assert numbers_in(left) == [number for number in numbers_in(ranges) if number > bound]
    assert all(left)


@given(positions)
def test_a_multirange_names_exactly_the_positions(there: list[int]) -> None:
    literal = multirange(there)

    pairs = [part.strip("[)").split(",") for part in literal.strip("{}").split("),") if part]
    stretches = [range(int(start), int(stop)) for start, stop in pairs]
    assert numbers_in(stretches) == there
    assert all(left.stop < right.start for left, right in pairwise(stretches)), "not merged"


def test_a_multirange_reads_like_postgres_writes_it() -> None:
    assert multirange([1, 2, 3, 7]) == "{[1,4),[7,8)}"
    assert multirange([]) == "{}"
