"""The schedule of faults is a pure function of the seed."""

from itertools import pairwise

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.schedule import KINDS, Fault, schedule


def test_the_same_seed_gives_the_same_schedule() -> None:
    assert schedule(7, 300) == schedule(7, 300)
    assert schedule(7, 300) != schedule(8, 300)


def test_a_schedule_does_not_depend_on_python_s_own_chance() -> None:
    # Written down: a change of the kinds or of the drawing makes old seeds worthless, and should be meant.
    assert [str(fault) for fault in schedule(1, 8)] == [
        "  1.00 s  relay_leader_terminated          for 0.00 s  dice 0.92",
        "  3.35 s  postgres_backends_terminated     for 0.00 s  dice 0.63",
        "  7.53 s  writer_killed                    for 0.00 s  dice 0.50",
    ]


def test_every_kind_happens_in_a_long_run_and_has_something_that_does_it() -> None:
    assert {fault.kind for fault in schedule(1, 300)} == set(KINDS) == set(FAULTS)


def test_only_the_chosen_kinds_happen_and_leave_their_part_alone_for_a_while() -> None:
    chosen = {"postgres_failed_over", "postgres_snapshot_restored"}

    faults = schedule(1, 120, only=chosen)

    assert {fault.kind for fault in faults} == chosen
    # Something must be committed in between that the next one remembers.
    assert all(later.at - sooner.ends_at >= 2.9 for sooner, later in pairwise(faults))


@pytest.mark.parametrize("seed", range(20))
def test_faults_begin_in_order_end_in_time_and_never_overlap_on_one_part(seed: int) -> None:
    faults = schedule(seed, 120)

    assert [fault.at for fault in faults] == sorted(fault.at for fault in faults)
    assert all(fault.at >= 1 and fault.ends_at <= 120 for fault in faults)
    last: dict[str, Fault] = {}
    for fault in faults:
        part = KINDS[fault.kind].part
        assert part not in last or last[part].ends_at < fault.at
        last[part] = fault
