"""A minute of chaos: real processes, real servers, about forty faults, and not one promise broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SEED = 3
# Without these, nothing here would show that Postgres can go back in time.
REWINDS = {"postgres_failed_over", "postgres_snapshot_restored", "postgres_crashed_asynchronously"}
PROMISES = ("lost", "doubled", "never_committed", "phantoms", "out_of_order", "wrong_sums", "unreported")


# The minute, the start of a dozen processes, and the time to come to rest on a busy machine.
@pytest.mark.timeout(400)
def test_after_a_minute_of_faults_every_event_has_had_each_effect_once_and_in_order() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--seconds", "50", "--seed", str(SEED), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert {name: report[name] for name in PROMISES} == dict.fromkeys(PROMISES, 0)
    assert report["seed"] == SEED
    # It was a real storm, and there was something in it to lose.
    assert sum(report["faults"].values()) > 25
    assert report["faults"].keys() >= REWINDS
    assert report["forgotten"] > 0
    assert report["events"] > 500
    assert report["rolled_back"] > 5
    assert report["mistakes"] > 10


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seconds", "1"], "--seconds wants at least 5"),
        (["--only", "writer_killed,earthquake"], "--only: earthquake is no kind of fault"),
    ],
)
def test_wrong_use_is_one_sentence_and_code_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2

    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert sentence in printed
