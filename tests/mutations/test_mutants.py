"""The list of mutants does not rot: what each breaks is there, once, and so are its tests.

Breaking them all takes half an hour: `./dev mutations`.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.mutations.lane import broken
from tests.mutations.mutant import Mutant
from tests.mutations.mutants import MUTANTS

ROOT = Path(__file__).parents[2]


@cache
def content(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def functions_of(module: str) -> frozenset[str]:
    """Return the names of tests as pytest wants them: those in a class with its name before them."""
    tree = ast.parse(content(module))
    classes = [(f"{one.name}::", one.body) for one in tree.body if isinstance(one, ast.ClassDef)]
    return frozenset(
        f"{prefix}{one.name}"
        for prefix, body in [("", tree.body), *classes]
        for one in body
        if isinstance(one, ast.FunctionDef)
    )


def problems(mutant: Mutant) -> Iterator[str]:
    try:
        after = broken(mutant, content(mutant.file))
        if after == content(mutant.file):
            yield "it changes nothing"
        if mutant.file.endswith(".py"):
            ast.parse(after)
        for test in mutant.named:
            module, _, name = test.partition("::")
            if name.partition("[")[0] not in functions_of(module):
                yield f"there is no {test}; name single tests, the quickest that notice"
    except (OSError, SyntaxError, ValueError) as error:
        yield str(error)


def test_what_each_mutant_breaks_is_there_and_so_are_its_tests() -> None:
    assert [f"{mutant.name}: {problem}" for mutant in MUTANTS for problem in problems(mutant)] == []


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
