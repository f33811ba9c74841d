"""What relay and consumers report becomes numbers, in one process and in files that many share."""

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from dovecote.envelope import Envelope
from dovecote.exporter.metrics import (
    BulkHistogram,
    ConsumerMetrics,
    RelayMetrics,
    heartbeats,
    shared_directory,
)
from dovecote.processes.children import started_at
from dovecote.telemetry.instrumentation import RelayState
from tests.support.processes import eventually
from tests.support.scraping import numbers_in, of_all

ROOT = Path(__file__).parents[3]

WORK_AND_DIE = """
import os
from dovecote.exporter.metrics import ConsumerMetrics, shared_directory
shared_directory()
metrics = ConsumerMetrics(["h"])
metrics.fetching("queue")
metrics.acted("h", [], again=True)
metrics.failed("h", "dead")
print(os.getpid())
"""


@given(st.lists(st.one_of(st.floats(0, 20), st.sampled_from([0.1, 0.5, 1.0, 10.0])), max_size=60))
def test_many_values_at_once_are_counted_as_one_after_the_other(amounts: list[float]) -> None:
    registries = CollectorRegistry(), CollectorRegistry()
    at_once = BulkHistogram("h", "-", ["of"], buckets=(0.1, 0.5, 1.0, 10.0), registry=registries[0])
    in_turn = Histogram("h", "-", ["of"], buckets=(0.1, 0.5, 1.0, 10.0), registry=registries[1])

    at_once.labels(of="x").observe_many(amounts)
    one = in_turn.labels(of="x")
    for amount in amounts:
        one.observe(amount)

    bulk, single = (numbers_in(registry) for registry in registries)
    assert bulk.by("le", "h_bucket") == single.by("le", "h_bucket")
    assert bulk("h_count", of="x") == len(amounts)
    assert bulk("h_sum", of="x") == pytest.approx(single("h_sum", of="x"))


def test_a_relay_is_in_one_state_at_a_time() -> None:
    registry = CollectorRegistry()
    metrics = RelayMetrics(registry)

    metrics.alive("standing_by")
    metrics.alive("leading")

    states = numbers_in(registry).by("state", "dovecote_relay_state")
    assert [state for state, value in states.items() if value] == ["leading"]
    assert set(states) == set(get_args(RelayState))


# Files that workers share -----------------------------------------------------------------------


def an_envelope(age: timedelta) -> Envelope:
    return Envelope(
        event_id=uuid4(),
        type="t",
        aggregate_type="a",
        aggregate_id="1",
        position=1,
        time=(datetime.now(UTC) - age).isoformat(),
        data={},
    )


def test_idle_and_stuck_are_distinguished(directory: Path) -> None:
    metrics = ConsumerMetrics(["h"])
    started, finish = threading.Event(), threading.Event()

    def work() -> None:
        with metrics.in_flight("h", 3):
            started.set()
            finish.wait(20)

    metrics.fetching("queue")
    idle = of_all(directory).by("pid", "dovecote_in_flight_seconds")
    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)

    def in_flight() -> float:
        metrics.fetching("queue")
        (seconds,) = of_all(directory).by("pid", "dovecote_in_flight_seconds").values()
        return seconds

    first = eventually(in_flight, 5, "a bundle in flight")
    eventually(lambda: in_flight() > first, 5, "a bundle that stays in flight")
    finish.set()
    thread.join()

    assert list(idle.values()) == [0]
    assert first > 0
    assert in_flight() == 0


def test_a_worker_that_has_just_started_is_alive(directory: Path) -> None:
    before = time.time()

    ConsumerMetrics(["h"])

    (heartbeat,) = heartbeats(directory).values()
    assert heartbeat >= before


def test_one_fetching_thread_that_is_silent_makes_the_worker_s_heartbeat_old(directory: Path) -> None:
    metrics = ConsumerMetrics(["h"])
    metrics.fetching("silent")
    (silent_since,) = heartbeats(directory).values()

    def fetched() -> bool:
        metrics.fetching("lively")
        return metrics._fetched["lively"] > silent_since

    eventually(fetched, 5, "a later sign of life")

    assert list(heartbeats(directory).values()) == [silent_since]


def test_time_from_commit_to_effect_is_that_of_each_event_and_of_no_replay(directory: Path) -> None:
    metrics = ConsumerMetrics(["h"])

    metrics.acted("h", [an_envelope(timedelta(seconds=age)) for age in (-5, 0.3, 20, 20)], again=False)
    metrics.acted("h", [an_envelope(timedelta(days=9))], again=True)

    numbers = of_all(directory)
    assert numbers("dovecote_processed_events_total", handler="h") == 5
    counts = {
        bound: numbers("dovecote_commit_to_effect_seconds_bucket", handler="h", le=bound)
        for bound in ("0.25", "0.5", "30.0", "+Inf")
    }
    assert counts == {"0.25": 1, "0.5": 2, "30.0": 4, "+Inf": 4}
    assert numbers("dovecote_commit_to_effect_seconds_sum", handler="h") == pytest.approx(40.3, abs=0.2)


def test_a_worker_that_is_gone_has_done_its_work_and_has_no_heartbeat(directory: Path) -> None:
    ours = ConsumerMetrics(["h"])
    ours.fetching("queue")
    # Its master is we; so ours are moved to where it looks.
    program = f"import os; os.getppid = lambda: {int(directory.name.split('-')[3])}\n{WORK_AND_DIE}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    numbers = of_all(directory)

    assert numbers("dovecote_failed_events_total", handler="h", state="dead") == 1
    assert int(done.stdout) not in heartbeats(directory)
    assert len(heartbeats(directory)) == 1


def test_what_a_master_left_that_is_gone_is_removed(directory: Path) -> None:
    ours, pid, _, digest = directory.name.rsplit("-", 3)
    gone, recycled = (directory.parent / f"{ours}-{of}-{digest}" for of in ("999999999-1", f"{pid}-1"))
    for left in (gone, recycled):
        left.mkdir()
        (left / "counter_1.db").touch()

    shared_directory()

    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_nobody_else_may_read_the_files(directory: Path) -> None:
    assert directory.stat().st_mode & 0o066 == 0
    _, pid, start, _ = directory.name.rsplit("-", 3)
    assert started_at(int(pid)) == int(start)
