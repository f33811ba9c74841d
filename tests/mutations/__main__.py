"""Break one protecting line at a time, in a copy of the tree, and see that a test notices.

./dev mutations [--only WORDS] [--resume] [--lanes N] [--list] [--json]

Says on stderr what begins, its verdict and how much is left. `--resume` keeps the verdicts of an earlier run that still
hold. Exit code 0: each was noticed. 1: at least one survived, or could not be tried because its test fails
anyway.
"""

import argparse
import json
import os
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TypeVar

from tests.mutations.lane import Lane, NotTheTest, lanes
from tests.mutations.mutant import Mutant
from tests.mutations.mutants import MUTANTS
from tests.mutations.results import Outcome, Results, digests_of_the_tree

# Of one test, where something is broken.
_MIN_TEST_SECONDS, _MAX_TEST_SECONDS = 15.0, 60.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./dev mutations", description="Break what protects, one line at a time.")
    parser.add_argument("--only", default="", help="mutants whose name or file contains this")
    parser.add_argument("--resume", action="store_true", help="go on after a run that was interrupted")
    parser.add_argument("--lanes", type=int, default=(os.cpu_count() or 2) + 1, help="so many are tried at a time")
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are stopped on the way out
    began = time.monotonic()
    outcomes = try_all(chosen, resume=given.resume, count=max(1, given.lanes))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    say(f"it took {duration(time.monotonic() - began)}, and {duration(used.ru_utime + used.ru_stime)} of processors")
    survivors = [one.name for one in outcomes if not one.noticed]
    if given.json:
        summary = {"mutants": len(outcomes), "survivors": survivors, "outcomes": [asdict(one) for one in outcomes]}
        sys.stdout.write(json.dumps(summary) + "\n")
    else:
        sys.stdout.write(f"{len(outcomes)} broken, {len(outcomes) - len(survivors)} noticed\n")
        sys.stdout.writelines(
            f"{'survived' if one.tried else 'not tried'}: {one.name}\n" for one in outcomes if not one.noticed
        )
    return 1 if survivors else 0


def try_all(chosen: Sequence[Mutant], *, resume: bool, count: int) -> list[Outcome]:
    """Return the outcomes in the order of the list."""
    results = Results(MUTANTS, digests_of_the_tree())
    known = {one.name: results.outcomes[one.name] for one in chosen if resume and one.name in results.outcomes}
    left = [one for one in chosen if one.name not in known]
    if known:
        say(f"{len(known)} of {len(chosen)} are known from an earlier run of the same code")
    if not left:
        return [known[one.name] for one in chosen]
    say(f"starting {count} lanes, each with servers of its own")
    with lanes(min(count, len(left))) as opened:
        seconds = unbroken(opened, left, results, resume=resume)
        began, done = time.monotonic(), 0

        def one(lane: Lane, number: int, mutant: Mutant) -> Outcome:
            nonlocal done
            place = f"[{number:>{len(str(len(left)))}}/{len(left)}]"
            # The shortest first: the first that fails is enough.
            tests = sorted(mutant.named, key=lambda test: seconds.get(test, 0))
            say(f"{place} begins   {mutant.name}: {' '.join(tests)}")
            # A test that hangs has failed long before it has taken as many times as long as it does unbroken.
            if failing := [test for test in tests if test not in seconds]:
                found = Outcome(mutant.name, False, f"{failing[0]} fails with nothing broken", 0.0, tried=False)
            else:
                slowest = max(seconds[test] for test in tests)
                found = outcome(lane, mutant, tests, min(_MAX_TEST_SECONDS, _MIN_TEST_SECONDS + 5 * slowest))
            if found.tried:
                results.remember(mutant, found)
            done += 1
            verdict = "noticed " if found.noticed else "SURVIVED" if found.tried else "NOT TRIED"
            rest = (time.monotonic() - began) / done * (len(left) - done)
            say(f"{place} {verdict} {mutant.name}, in {found.seconds:.1f} s: {found.by}; {duration(rest)} to go")
            return found

        found = side_by_side(opened, left, one)
    known |= {one.name: one for one in found}
    return [known[one.name] for one in chosen]


def unbroken(opened: Sequence[Lane], mutants: Sequence[Mutant], results: Results, *, resume: bool) -> dict[str, float]:
    """Run each named test once where nothing is broken; return how long those took that pass, and say which fail."""
    named = {test for mutant in mutants for test in mutant.named}
    seconds = {test: took for test, took in results.passed.items() if resume and test in named}
    modules: dict[str, list[str]] = {}
    for test in sorted(named - seconds.keys()):
        modules.setdefault(test.partition("::")[0], []).append(test)
    if modules:
        say(f"running {len(named - seconds.keys())} named tests of {len(modules)} modules with nothing broken")

    def one(lane: Lane, number: int, module: str) -> None:
        began = time.monotonic()
        try:
            ran = lane.run(modules[module], stop_early=False, unbroken=True)
        except NotTheTest as error:
            say(f"[{number}/{len(modules)}] {module} CANNOT BE RUN: {error}")
            return
        say(f"[{number}/{len(modules)}] {module}: {time.monotonic() - began:.1f} s")
        for test in modules[module]:
            those = {name for name in ran.seconds if test in (name, name.partition("[")[0])}
            if those & set(ran.failed) or not those & set(ran.passed):
                say(f"FAILS OR IS SKIPPED with nothing broken: {test}")
            else:
                seconds[test] = round(sum(ran.seconds[name] for name in those), 2)
                results.remember_unbroken(test, seconds[test])

    side_by_side(opened, list(modules), one)
    return seconds


def outcome(lane: Lane, mutant: Mutant, tests: Sequence[str], test_seconds: float) -> Outcome:
    """Break one line in the lane's copy and run its tests there."""
    began = time.monotonic()
    try:
        failed, tried = lane.run_broken(mutant, tests, test_seconds).failed, True
    except NotTheTest as error:
        return Outcome(mutant.name, False, str(error), round(time.monotonic() - began, 1), tried=False)
    by = failed[0] if failed else "no test failed"
    return Outcome(mutant.name, bool(failed), by, round(time.monotonic() - began, 1), tried=tried)


def side_by_side(
    opened: Sequence[Lane], items: Sequence[Item], one: Callable[[Lane, int, Item], Result]
) -> list[Result]:
    """Give each lane the next item until none is left; the first error ends all."""
    waiting: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    for number, item in enumerate(items, start=1):
        waiting.put((number, item))
    found: list[Result] = []
    errors: list[BaseException] = []

    def work(lane: Lane) -> None:
        try:
            while not errors:
                found.append(one(lane, *waiting.get_nowait()))
        except queue.Empty:
            return
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in opened]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        raise
    if errors:
        raise errors[0]
    return found


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def table(mutants: Iterable[Mutant]) -> str:
    """Return the list as Markdown."""
    lines = ["| what is broken | where | tests that must notice |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | `{one.file}` | {', '.join(one.named)} |" for one in mutants]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
