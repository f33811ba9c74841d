"""The list of mutants does not rot: what each breaks is there, once, and so are its tests.

Breaking them all takes a quarter of an hour: `./dev mutations`.
"""

import ast
from pathlib import Path

import pytest

from tests.mutations.__main__ import break_it
from tests.mutations.mutant import Mutant
from tests.mutations.mutants import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_breaks_is_there_and_so_are_its_tests(tmp_path: Path, mutant: Mutant) -> None:
    file = tmp_path / mutant.file
    file.parent.mkdir(parents=True)
    before = (ROOT / mutant.file).read_text(encoding="utf-8")
    file.write_text(before, encoding="utf-8")

    break_it(tmp_path, mutant)

    broken = file.read_text(encoding="utf-8")
    assert broken != before
    if file.suffix == ".py":
        ast.parse(broken)
    for test in mutant.tests.split():
        module, _, name = test.partition("::")
        assert (ROOT / module).is_file(), test
        assert f"def {name}" in (ROOT / module).read_text(encoding="utf-8"), test


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
