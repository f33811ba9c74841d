"""One of the places where mutants are tried: a copy of the tree, servers that stay, and a process that forks.

Two lanes share nothing, so a test that counts sessions or fills the notification queue disturbs no other.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import redis
from sqlalchemy import make_url

from dovecote.local.servers import servers
from dovecote.migrations import schema
from tests.mutations.mutant import Mutant
from tests.support.migrations import LOCATIONS
from tests.support.processes import a_place_for_servers

ROOT = Path(__file__).parents[2]
# For each module that tests are named of; a single test has TEST_SECONDS.
_MAX_SECONDS = 400
_TEST_SECONDS = 60.0
_TEMPLATE = "dovecote_template_of_mutants"
# Later than the file it replaces and unlike any other time: compiled code is recognized by it.
_SECONDS_LATER = 1_000


class NotTheTest(Exception):
    """A tree whose tests cannot even start proves nothing about them."""


@dataclass(frozen=True)
class Run:
    """How the tests of one tree ended."""

    failed: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


class Lane:
    def __init__(self, place: Path, environment: Mapping[str, str]) -> None:
        self._place, self._environment = place, environment
        self.tree = place / "tree"
        self._broken = 0
        copy_tree(self.tree)
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        tests: Sequence[str],
        *,
        template: bool = True,
        stop_early: bool = True,
        unbroken: bool = False,
        test_seconds: float = _TEST_SECONDS,
    ) -> Run:
        """Run tests in the order in which they are named, until one fails.

        Shape:  with `template` the databases are copies of one that the unbroken code has migrated.
        Errors: NotTheTest when they cannot be collected or set up.
        """
        report, output = self._place / "report.json", self._place / "output.txt"
        report.unlink(missing_ok=True)
        with redis.Redis.from_url(self._environment["REDIS_URL"]) as client:
            client.flushall()
        environment = {"DOVECOTE_TEST_TEMPLATE": _TEMPLATE} if template else {}
        if not unbroken:
            # What is compiled of a broken file would outlive it.
            environment["PYTHONDONTWRITEBYTECODE"] = "1"
        words = ["-q", "-p", "no:cacheprovider", "-o", f"timeout={test_seconds:.0f}", *(["-x"] if stop_early else [])]
        max_seconds = _MAX_SECONDS * max(1, len({test.partition("::")[0] for test in tests}))
        ended = self._ask(
            {
                "words": [*words, *tests],
                "environment": environment,
                "report": str(report),
                "output": str(output),
                "max_seconds": max_seconds,
            }
        )
        if not ended:
            return Run((f"nothing came to an end within {max_seconds} s",))
        if not report.exists():
            # The test process itself was ended: that is noticed, by whatever test ran then.
            return Run(("the process of the tests was ended",))
        seen = json.loads(report.read_text(encoding="utf-8"))
        if seen["failed"] or seen["status"] == 0:
            return Run(tuple(seen["failed"]), tuple(seen["passed"]), seen["seconds"])
        said = output.read_text(encoding="utf-8", errors="replace")
        raise NotTheTest(
            f"pytest ended with {seen['status']} before a test was tried: {seen['untried']}\n{said[-2_000:]}"
        )

    def run_broken(self, mutant: Mutant, tests: Sequence[str], test_seconds: float = _TEST_SECONDS) -> Run:
        """Break one line, run tests, mend it."""
        path = self.tree / mutant.file
        before, times = path.read_bytes(), path.stat()
        break_it(self.tree, mutant)
        self._broken += 1
        later = times.st_mtime + _SECONDS_LATER + self._broken
        os.utime(path, (later, later))
        try:
            return self.run(tests, template=not is_of_the_schema(mutant.file), test_seconds=test_seconds)
        finally:
            path.write_bytes(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def _ask(self, request: Mapping[str, Any]) -> bool:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(self.tree / "tests/mutations/forking.py")],
                cwd=self.tree,
                env={**os.environ, **self._environment, "PYTHONPATH": str(self.tree)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return bool(json.loads(self._process.stdout.readline())["ended"])


@contextmanager
def lanes(count: int) -> Iterator[list[Lane]]:
    """Lanes whose servers run until the end."""
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="dovecote-mutants-")))
            settings = {"fsync": "off", "max_prepared_transactions": "10"}
            disk = stack.enter_context(a_place_for_servers())
            postgres, cache = stack.enter_context(servers(disk, postgres_settings=settings))
            with psycopg.connect(postgres.url, autocommit=True) as connection:
                connection.execute(f"create database {_TEMPLATE}")
            url = make_url(postgres.url).set(database=_TEMPLATE)
            schema.upgrade(url.render_as_string(hide_password=False), locations=LOCATIONS)
            lane = Lane(
                place, {"DATABASE_URL": postgres.url, "REDIS_URL": cache.url, "DOVECOTE_TEST_ORIGIN": "embedded"}
            )
            stack.callback(lane.close)
            opened.append(lane)
        yield opened


def is_of_the_schema(file: str) -> bool:
    """Return whether a database that the unbroken code has migrated is another than this one would make."""
    return "migrations" in Path(file).parts or Path(file).name in ("schema.py", "tables.py")


def files_of_the_tree() -> list[str]:
    """Return the paths that git knows of and that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607 - git is where it is
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return sorted({name for name in listed.stdout.splitlines() if (ROOT / name).is_file()})


def copy_tree(to: Path) -> None:
    """Copy what git knows of, as it is now."""
    for name in files_of_the_tree():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)


def break_it(tree: Path, mutant: Mutant) -> None:
    """Errors: ValueError when the line is not there once, as it must be."""
    path = tree / mutant.file
    path.write_text(broken(mutant, path.read_text(encoding="utf-8")), encoding="utf-8")


def broken(mutant: Mutant, whole: str) -> str:
    """Errors: ValueError when the line is not there once, as it must be."""
    if (times := whole.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name!r}: what it breaks stands {times} times in {mutant.file}; mend the list")
    return whole.replace(mutant.old, mutant.new)
