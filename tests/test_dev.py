"""`./dev test` before anything runs: which passes of pytest there are, and what their last lines come to."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def no_servers_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATABASE_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def dev() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "dev"))


def test_everything_runs_in_several_processes_and_what_must_be_alone_in_one(dev: dict[str, Any]) -> None:
    (many, _), (alone, _) = dev["passes_of_pytest"](["--long"])

    assert many[many.index("-n") + 1].isdecimal()
    assert many[-3:] == ["-m", "not alone", "--long"]
    assert alone == ["-m", "alone", "--long"]


@pytest.mark.parametrize("words", [["-k", "relay"], ["-x"], ["tests/test_dev.py"], ["tests/test_dev.py::test_it"]])
def test_a_selection_runs_at_once_in_one_process(dev: dict[str, Any], words: list[str]) -> None:
    assert dev["passes_of_pytest"](words) == [(words, {})]


def test_servers_that_are_given_are_for_one_process(dev: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://given")
    monkeypatch.setenv("REDIS_URL", "redis://given")

    assert dev["passes_of_pytest"]([]) == [([], {})]


@pytest.mark.parametrize("words", [[], ["tests/domain"], ["-v", "--durations", "20"]])
def test_a_folder_is_no_selection(dev: dict[str, Any], words: list[str]) -> None:
    assert [passed for passed, _ in dev["passes_of_pytest"](words)] == [
        [*dev["MANY"], "-m", "not alone", *words],
        ["-m", "alone", *words],
    ]


@pytest.mark.parametrize(
    ("lasts", "total"),
    [
        (["3 passed in 1.50s"], "3 passed in 1.50s"),
        (
            ["1 failed, 3700 passed, 12 skipped in 300.00s (0:05:00)", "40 passed, 3 deselected, 1 error in 20.25s"],
            "1 failed, 3740 passed, 12 skipped, 3 deselected, 1 errors in 320.25s",
        ),
        (["no tests ran in 0.10s"], "no tests ran in 0.10s"),
        ([""], "no tests ran in 0.00s"),
    ],
)
def test_the_last_line_is_the_sum_of_the_passes(dev: dict[str, Any], lasts: list[str], total: str) -> None:
    assert dev["total"](lasts) == total
