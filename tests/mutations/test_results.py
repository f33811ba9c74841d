"""A verdict is kept for as long as nothing that it hangs on has changed."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutations.mutant import Mutant
from tests.mutations.results import Outcome, Results

MUTANT = Mutant("a line is gone", "domain/a.py", "old", "new", "tests/test_a.py::test_it tests/test_b.py::test_it[1 2]")
OUTCOME = Outcome("a line is gone", True, "tests/test_a.py::test_it", 1.5)
TREE = {
    "domain/a.py": "1",
    "domain/other.py": "1",
    "tests/conftest.py": "1",
    "tests/test_a.py": "1",
    "tests/test_b.py": "1",
    "tests/test_other.py": "1",
    "tests/mutations/mutants.py": "1",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "cache" / "mutations.jsonl"
    Results([MUTANT], TREE, file).remember(MUTANT, OUTCOME)
    return file


@pytest.mark.parametrize("same", ["tests/test_other.py", "tests/mutations/mutants.py"])
def test_a_verdict_outlives_a_change_of_another_test_or_mutant(file: Path, same: str) -> None:
    assert Results([MUTANT], TREE | {same: "2"}, file).outcomes == {MUTANT.name: OUTCOME}


@pytest.mark.parametrize(
    "changed", ["domain/a.py", "domain/other.py", "tests/conftest.py", "tests/test_a.py", "tests/test_b.py"]
)
def test_a_verdict_is_dropped_when_the_code_or_a_test_of_it_changes(file: Path, changed: str) -> None:
    assert Results([MUTANT], TREE | {changed: "2"}, file).outcomes == {}
    assert file.read_text(encoding="utf-8") == ""


def test_a_verdict_is_dropped_when_the_mutant_changes(file: Path) -> None:
    assert Results([replace(MUTANT, new="newer")], TREE, file).outcomes == {}


def test_a_test_that_passes_unbroken_is_known_until_it_changes(file: Path) -> None:
    test = "tests/test_b.py::test_it[1 2]"
    Results([MUTANT], TREE, file).remember_unbroken(test, 0.5)

    assert Results([MUTANT], TREE, file).passed == {test: 0.5}
    assert Results([MUTANT], TREE | {"tests/test_a.py": "2"}, file).passed == {test: 0.5}
    assert Results([MUTANT], TREE | {"tests/test_b.py": "2"}, file).passed == {}


def test_a_line_that_was_cut_off_when_the_run_ended_is_passed_over(file: Path) -> None:
    with file.open("a", encoding="utf-8") as cut:
        cut.write('{"key": "1')

    assert Results([MUTANT], TREE, file).outcomes == {MUTANT.name: OUTCOME}
