"""What a mutant is; the table is in mutants.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One protecting line, broken."""

    name: str
    file: str
    old: str
    new: str
    tests: str
