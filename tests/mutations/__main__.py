"""Break one protecting line at a time, in a copy of the tree, and see that a test notices.

./dev mutations [--only WORDS] [--list] [--json]

Exit code 0: each was noticed. 1: at least one survived, or the tests fail on the tree as it is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dovecote.local.servers import servers
from tests.mutations.mutant import Mutant
from tests.mutations.mutants import MUTANTS
from tests.support.processes import a_place_for_servers

ROOT = Path(__file__).parents[2]
# For each module or test that is run.
_MAX_SECONDS = 400


@dataclass(frozen=True)
class Outcome:
    name: str
    noticed: bool
    by: str
    seconds: float


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./dev mutations", description="Break what protects, one line at a time.")
    parser.add_argument("--only", default="", help="mutants whose name or file contains this")
    parser.add_argument("--list", action="store_true", help="print the table and break nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(words)
    chosen = [mutant for mutant in MUTANTS if given.only in mutant.name or given.only in mutant.file]
    if not chosen:
        sys.stderr.write(f"dovecote: no mutant has {given.only!r} in its name or file; --list shows all\n")
        return 2
    if given.list:
        sys.stdout.write(json.dumps([asdict(one) for one in chosen]) + "\n" if given.json else table(chosen))
        return 0
    with system() as environment:
        if failed := first_failure(ROOT, sorted({test for one in chosen for test in one.tests.split()}), environment):
            sys.stderr.write(f"dovecote: nothing is broken and yet a test fails: {failed}\n")
            return 1
        outcomes = [outcome(mutant, environment) for mutant in chosen]
    survivors = [one.name for one in outcomes if not one.noticed]
    if given.json:
        told = {"mutants": len(outcomes), "survivors": survivors, "outcomes": [asdict(one) for one in outcomes]}
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        sys.stdout.write(f"{len(outcomes)} broken, {len(outcomes) - len(survivors)} noticed\n")
    return 1 if survivors else 0


def outcome(mutant: Mutant, environment: Mapping[str, str]) -> Outcome:
    """Break one line in a copy and run its tests there."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="dovecote-mutant-") as place:
        tree = Path(place) / "tree"
        copy_tree(tree)
        break_it(tree, mutant)
        noticed = first_failure(tree, mutant.tests.split(), environment)
    found = Outcome(mutant.name, bool(noticed), noticed, round(time.monotonic() - began, 1))
    sys.stderr.write(f"{'noticed ' if noticed else 'SURVIVED'} {mutant.name}: {noticed or 'no test failed'}\n")
    return found


def copy_tree(to: Path) -> None:
    """Copy what git knows of, as it is now."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - git is where it is
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def break_it(tree: Path, mutant: Mutant) -> None:
    """Errors: ValueError when the line is not there once, as it must be."""
    path = tree / mutant.file
    whole = path.read_text(encoding="utf-8")
    if (times := whole.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name!r}: what it breaks stands {times} times in {mutant.file}; mend mutants.py")
    path.write_text(whole.replace(mutant.old, mutant.new), encoding="utf-8")


def first_failure(tree: Path, tests: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run tests until one fails, and name it; nothing if all pass."""
    max_seconds = _MAX_SECONDS * len(tests)
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider", "-o", "timeout=60"]
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=tree,
            env={**environment, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=max_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"nothing came to an end within {max_seconds} s"
    if done.returncode == 0:
        return ""
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if failed:
        return failed[0].removeprefix("FAILED ")
    if "Timeout" in done.stdout + done.stderr:
        return "a test that came to no end"
    # A tree that does not even run tells nothing about its tests.
    raise RuntimeError(f"no test failed, and yet pytest ended with {done.returncode}:\n{done.stdout[-2_000:]}")


@contextmanager
def system() -> Iterator[Mapping[str, str]]:
    """Servers for all of the runs, and how tests find them."""
    if os.environ.get("DATABASE_URL") and os.environ.get("REDIS_URL"):
        yield os.environ
        return
    settings = {"fsync": "off", "max_prepared_transactions": "10"}
    with a_place_for_servers() as place, servers(place, postgres_settings=settings) as (postgres, redis):
        yield {**os.environ, "DATABASE_URL": postgres.url, "REDIS_URL": redis.url}


def table(mutants: Sequence[Mutant]) -> str:
    """Return the list as Markdown."""
    lines = ["| what is broken | where | tests that must notice |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | `{one.file}` | {one.tests.replace(' ', ', ')} |" for one in mutants]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
