"""The list of mutants does not rot: what each breaks is there, once, and so are its tests.

Breaking them all takes half an hour: `./dev mutations`.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.mutations.lane import broken
from tests.mutations.mutant import Mutant
from tests.mutations.mutants import MUTANTS

ROOT = Path(__file__).parents[2]


@cache
def content(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def functions_of(module: str) -> frozenset[str]:
    return frozenset(node.name for node in ast.parse(content(module)).body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_a_mutant_breaks_is_there_and_so_are_its_tests(mutant: Mutant) -> None:
    before = content(mutant.file)

    after = broken(mutant, before)

    assert after != before
    if mutant.file.endswith(".py"):
        ast.parse(after)
    for test in mutant.named:
        module, _, name = test.partition("::")
        assert name.partition("[")[0] in functions_of(module), f"{test}: name single tests, the quickest that notices"


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
