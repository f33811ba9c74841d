"""Break everything, for a while, and see if a promise breaks: see README.md beside this file.

./dev chaos --seconds 60 --seed 1
"""

import argparse
import json
import random
import sys

from tests.chaos import report
from tests.chaos.run import Options, Report, run
from tests.chaos.schedule import KINDS, schedule


def main(words: list[str]) -> int:
    given = _parser().parse_args(words)
    if given.seconds < 5 or given.seeds < 1 or given.pause <= 0 or given.rate <= 0:
        sys.stderr.write("dovecote: --seconds wants at least 5, --seeds at least 1, --pause and --rate more than 0\n")
        return 2
    only = given.only.split(",") if given.only else list(KINDS)
    if unknown := sorted(set(only) - KINDS.keys()):
        sys.stderr.write(f"dovecote: --only: {unknown[0]} is no kind of fault; there are {', '.join(sorted(KINDS))}\n")
        return 2
    seed = random.SystemRandom().randrange(100_000) if given.seed is None else given.seed
    if given.schedule:
        for fault in schedule(seed, given.seconds, given.pause, only):
            sys.stdout.write(f"{fault}\n")
        return 0
    options = Options(given.seconds, given.pause, given.rate, given.quiet, given.keep, tuple(only))
    reports = []
    for one in range(seed, seed + given.seeds):
        _say(f"seed {one}: starting two servers, two relays, four workers, three writers")
        reports.append(run(one, options, _say))
        if given.seeds > 1:
            _say(f"seed {one}: {_in_a_line(reports[-1])}")
    summary = report.summarize(reports)
    sys.stdout.write((json.dumps(summary) if given.json else report.page(summary)) + "\n")
    return 0 if summary["kept_promises"] else 1


def _in_a_line(one: Report) -> str:
    return (
        f"{sum(one.faults.values())} faults, {one.events} events, {one.lost} lost, {one.doubled} doubled,"
        f" {one.out_of_order} out of order, {one.phantoms} phantoms, longest stall {one.longest_stall_seconds} s"
        + ("" if one.kept_promises else f"; A PROMISE BROKE, see {one.directory}")
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./dev chaos", description="Break everything and see if a promise breaks.")
    parser.add_argument("--seconds", type=float, default=60, help="how long faults go on (60)")
    parser.add_argument("--seed", type=int, help="chooses the faults and their times; a random one if not given")
    parser.add_argument("--seeds", type=int, default=1, help="run so many seeds, one after the other, and sum up")
    parser.add_argument("--pause", type=float, default=1.4, help="mean seconds from one fault to the next (1.4)")
    parser.add_argument("--rate", type=float, default=150, help="events a second that writers try to write (150)")
    parser.add_argument(
        "--only", metavar="KIND,...", help="no other kinds of faults than these (schedule.py lists them)"
    )
    parser.add_argument(
        "--quiet", type=float, default=150, help="how long it may take to come to rest afterwards (150)"
    )
    parser.add_argument("--schedule", action="store_true", help="only print the faults of the seed")
    parser.add_argument("--keep", action="store_true", help="keep logs and history even if all went well")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
