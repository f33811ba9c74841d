"""Verdicts of earlier runs, so that one that was interrupted goes on where it was.

A verdict holds for the mutant, the modules of its tests and everything else in the tree but other tests: what any of
them has changed since is tried again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.mutations.lane import ROOT, files_of_the_tree
from tests.mutations.mutant import Mutant

FILE = ROOT / ".cache" / "mutations.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant; `by` names the test that noticed, or why none could be tried."""

    name: str
    noticed: bool
    by: str
    seconds: float
    tried: bool = True


class Results:
    """`digests` has the content of each file of the tree."""

    def __init__(self, mutants: Sequence[Mutant], digests: Mapping[str, str], file: Path = FILE) -> None:
        self._file = file
        self._digests = digests
        self._common = _digest([f"{name} {digests[name]}" for name in sorted(digests) if not _is_a_test(name)])
        self.passed: dict[str, float] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._load(mutants)

    def remember(self, mutant: Mutant, outcome: Outcome) -> None:
        self._append({"key": self._key(mutant), "outcome": asdict(outcome)})

    def remember_unbroken(self, test: str, seconds: float) -> None:
        """Record that a test passes on the tree as it is, and how long it takes."""
        self._append({"key": self._test_key(test), "test": test, "seconds": seconds})

    def _load(self, mutants: Sequence[Mutant]) -> None:
        """Keep what still holds, drop the rest from the file."""
        keys = {self._key(mutant): mutant.name for mutant in mutants}
        lines: dict[str, str] = {}
        for line in self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the run was ended in the middle of it
                continue
            if "outcome" in row and row["key"] in keys:
                self.outcomes[keys[row["key"]]] = Outcome(**row["outcome"])
                lines[row["key"]] = line
            elif "test" in row and row["key"] == self._test_key(row["test"]):
                self.passed[row["test"]] = row["seconds"]
                lines[row["key"]] = line
        self._file.parent.mkdir(exist_ok=True)
        self._file.write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8")

    def _append(self, row: dict[str, object]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _key(self, mutant: Mutant) -> str:
        return _digest([self._common, *asdict(mutant).values(), *map(self._test_key, mutant.named)])

    def _test_key(self, test: str) -> str:
        module = test.partition("::")[0]
        return _digest([self._common, test, self._digests.get(module, "")])


def digests_of_the_tree() -> dict[str, str]:
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in files_of_the_tree()}


def _is_a_test(name: str) -> bool:
    path = Path(name)
    return path.parts[0] == "tests" and (path.name.startswith("test_") or "mutations" in path.parts)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
