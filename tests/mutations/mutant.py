"""What a mutant is; mutants.py has all of them."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One protecting line, broken."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def named(self) -> list[str]:
        """The tests, one by one. The id of a parametrized one may have spaces."""
        return re.split(r" (?=tests/)", self.tests)
