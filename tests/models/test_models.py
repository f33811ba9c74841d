"""Every order of things, for few writers and two relays: Spin checks the models beside this module.

A model that cannot fail says nothing, so each thing it relies on is broken in turn, and Spin must find the loss.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MODELS = Path(__file__).parent

# They hang on nothing but the files beside this one, and take a minute of a processor.
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not shutil.which("spin") or not shutil.which("gcc"), reason="no Spin here: apt-get install spin gcc libc6-dev"
    ),
]
# A minute or two more, and up to 2 GB of memory.
thorough = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "thorough", reason="only with HYPOTHESIS_PROFILE=thorough"
)


def check(place: Path, model: str, defined: str, fairly: bool = False, broken: bool = False) -> str:
    """Return what Spin found out about the model: nothing, or its first error.

    With `fairly`, check that what is promised comes at last, where no process is left out for ever. A `broken` one has
    its error among the first thousands of states: to optimise takes longer than to look.
    """
    defines = [f"-D{word}" for word in defined.split()]
    run(place, "spin", *defines, "-a", str(MODELS / model))
    kind = ["-DNFAIR=4"] if fairly else ["-DSAFETY", "-DNOCLAIM"]
    run(place, "gcc", "-O0" if broken else "-O2", "-w", *kind, "-o", "pan", "pan.c")
    output = run(place, "./pan", "-m20000", "-w24", *(["-a", "-f"] if fairly else []))
    assert "max search depth too small" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("pan:1: ")]
    assert ("errors: 0" in output) == (not errors), output
    return errors[0] if errors else ""


def run(place: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param("", id="two writers, two events each"),
        pytest.param("AT_ONCE", id="reads by the safe position of the read before", marks=thorough),
        pytest.param("WRITERS=3 EVENTS=1", id="three writers", marks=thorough),
    ],
)
def test_the_reader_loses_nobody_and_keeps_the_order_of_each_aggregate(tmp_path: Path, bounds: str) -> None:
    assert check(tmp_path, "reading.pml", bounds) == ""


def test_everything_committed_is_sent_at_last(tmp_path: Path) -> None:
    assert check(tmp_path, "reading.pml", "WRITERS=2 EVENTS=1", fairly=True) == ""


@pytest.mark.parametrize(
    ("broken", "found"),
    {
        "LOCK_AFTER_POSITION": "checkpoint",
        "LOCK_RELEASED_BEFORE_COMMIT": "checkpoint",
        "MARKS_BEFORE_SEQUENCE": "checkpoint",
        "ROWS_BEFORE_WATERMARK": "checkpoint",
        "CHECKPOINT_AT_HIGH_WATER": "checkpoint",
        "RECORDED_BEFORE_SENT": "checkpoint",
        "ROW_NOT_LOCKED": "newest_of",
        "LATE_BEFORE_BEYOND": "newest_of",
        "OVER_BEFORE_BEYOND": "newest_of",
        "OVER_BY_LOCKS": "checkpoint",
        "ASKED_ONCE": "newest_of",
        "ONLY_THE_LAST_LOOK": "checkpoint",
        "NO_MORE_THAN_THE_WRITERS": "checkpoint",
        "BEYOND_GOES_ALONG": "newest_of",
        "REST_NOT_LOOKED_INTO": "checkpoint",
    }.items(),
)
def test_a_reading_that_is_broken_is_found_out(tmp_path: Path, broken: str, found: str) -> None:
    assert "assertion violated" in (error := check(tmp_path, "reading.pml", broken, broken=True))
    assert found in error


def troubles(
    deaths: int = 0,
    cuts: int = 0,
    thefts: int = 0,
    flushes: int = 0,
    restarts: int = 0,
    rewinds: int = 0,
    events: int = 2,
) -> str:
    return (
        f"DEATHS={deaths} CUTS={cuts} THEFTS={thefts} FLUSHES={flushes} RESTARTS={restarts} REWINDS={rewinds}"
        f" EVENTS={events}"
    )


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(troubles(deaths=1, flushes=1, restarts=1, events=1), id="a death, Redis flushed, Redis restarted"),
        pytest.param(troubles(cuts=1, flushes=2, events=1), id="a session cut, Redis flushed twice"),
        pytest.param(troubles(thefts=1, flushes=1, events=1), id="two leaders, Redis flushed"),
        pytest.param(troubles(deaths=1, flushes=1, restarts=1), id="the same, two events", marks=thorough),
        pytest.param(troubles(cuts=1, flushes=2), id="a cut, two flushes, two events", marks=thorough),
        pytest.param(troubles(thefts=1, flushes=1), id="two leaders, a flush, two events", marks=thorough),
        pytest.param(troubles(deaths=1, cuts=1, flushes=1), id="a death, a cut, a flush", marks=thorough),
        pytest.param(troubles(thefts=1, flushes=2, events=1), id="two leaders, Redis flushed twice", marks=thorough),
        pytest.param(troubles(thefts=1, restarts=1), id="two leaders, Redis restarted", marks=thorough),
    ],
)
def test_relays_that_take_turns_lose_nothing(tmp_path: Path, trouble: str) -> None:
    assert check(tmp_path, "hand_over.pml", trouble) == ""


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(troubles(rewinds=1), id="Postgres goes back"),
        # A phantom is possible then: a message names the run of Postgres, and this seems to be the same.
        pytest.param(f"SAME_RUN LOSS_ONLY {troubles(rewinds=1, events=1)}", id="with its memory, past a heartbeat"),
        pytest.param(troubles(rewinds=1, deaths=1, events=1), id="and a death", marks=thorough),
        pytest.param(troubles(rewinds=1, flushes=1, events=1), id="and Redis flushed", marks=thorough),
        pytest.param(troubles(rewinds=1, restarts=1, events=1), id="and Redis restarted", marks=thorough),
        pytest.param(troubles(rewinds=1, thefts=1, events=1), id="and two leaders", marks=thorough),
        pytest.param(troubles(rewinds=2, events=1), id="Postgres goes back twice", marks=thorough),
    ],
)
def test_what_postgres_remembers_is_done_and_what_it_has_forgotten_is_not(tmp_path: Path, trouble: str) -> None:
    assert check(tmp_path, "hand_over.pml", trouble) == ""


@pytest.mark.parametrize(
    ("broken", "trouble", "found"),
    [
        ("RECORDED_BEFORE_SENT", troubles(deaths=1), "done"),
        ("FENCE_UNSEEN", troubles(flushes=1), "done"),
        ("FENCE_NOT_COMPARED", troubles(deaths=1, flushes=1), "done"),
        ("KNOWN_BEFORE_SENT_AGAIN", troubles(deaths=1, flushes=1), "done"),
        ("PUBLISH_UNFENCED", troubles(thefts=1), "mine>=claimed"),
        ("RECORD_UNFENCED", troubles(thefts=1, flushes=1), "epoch==mine"),
        ("RECORD_UNFENCED LOSS_ONLY", troubles(thefts=1, flushes=1), "done"),
        ("RUN_NOT_COMPARED", troubles(rewinds=1, events=1), "done"),
        ("SAME_RUN LOSS_ONLY HEARTBEAT_NOT_COMPARED", troubles(rewinds=1, events=1), "done"),
        ("IDS_NOT_SALTED", troubles(rewinds=1, events=1), "done"),
        ("DROP_UNFENCED", troubles(rewinds=1, deaths=1, events=1), "done"),
        ("NOT_LOOKED_UP", troubles(rewinds=1, events=1), "hand&"),
    ],
)
def test_a_hand_over_that_is_broken_is_found_out(tmp_path: Path, broken: str, trouble: str, found: str) -> None:
    assert "assertion violated" in (error := check(tmp_path, "hand_over.pml", f"{broken} {trouble}", broken=True))
    assert found in error
