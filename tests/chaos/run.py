"""One run: build it up, let the faults befall it, wait until it is quiet, judge what happened."""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
import redis

from tests.chaos import checker, routes
from tests.chaos.clocks import real_time
from tests.chaos.faults import befall
from tests.chaos.history import History, collect
from tests.chaos.schedule import KINDS, Fault, schedule
from tests.chaos.stage import Moot, Stage

_PLACE = Path("/var/tmp")  # noqa: S108  # the servers' own user must be able to reach it
_TURN_SECONDS = 0.05

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The options of a run.

    pause_seconds      mean time between the beginnings of two faults
    only               the kinds of faults to choose from
    events_per_second  what the writers try to write together
    quiet_seconds      how long the system is given, after the last fault, to come to rest
    """

    seconds: float = 60.0
    pause_seconds: float = 1.4
    events_per_second: float = 150.0
    quiet_seconds: float = 150.0
    keep: bool = False
    only: tuple[str, ...] = tuple(KINDS)


@dataclass(frozen=True)
class Report:
    """What a run found; the counts of broken promises are those of checker.Verdict.

    faults                 those that took place, by kind; `moot` had nothing to befall
    events                 those that Postgres remembers at the end
    forgotten              those whose commit it had answered, and which it forgot; no broken promise
    longest_stall_seconds  longest time without any effect while an event was due
    recovery_seconds       worst time, by kind, from a fault's end until all that was committed by then was done
    quiet_seconds          from the end of all faults until nothing was due or queued; None: it never was
    directory              where logs, schedule and history were kept; None when they were not
    """

    seed: int
    seconds: float
    kept_promises: bool
    faults: dict[str, int]
    moot: dict[str, int]
    events: int
    effects: int
    rolled_back: int
    forgotten: int
    lost: int
    doubled: int
    never_committed: int
    phantoms: int
    out_of_order: int
    wrong_sums: int
    mistakes: int
    unreported: int
    longest_stall_seconds: float
    recovery_seconds: dict[str, float]
    quiet_seconds: float | None
    directory: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(seed: int, options: Options, say: Say) -> Report:
    """Run once. The directory is kept when a promise broke, or when this raises."""
    directory = Path(tempfile.mkdtemp(dir=_PLACE, prefix=f"dovecote-chaos-{seed}-"))
    directory.chmod(0o711)
    faults = schedule(seed, options.seconds, options.pause_seconds, options.only)
    (directory / "schedule.json").write_text(json.dumps([fault.as_json() for fault in faults], indent=1))
    try:
        with Stage(directory, options.events_per_second).standing() as stage:
            done, moot = _befall_all(stage, faults, options.seconds, say)
            stage.stop_writing()
            quiet_seconds = stage.wait_until_quiet(options.quiet_seconds)
            with stage.connection() as connection:
                history = collect(directory, connection, routes.HANDLERS, routes.ORDERED, stage.rewinds)
    except BaseException:
        say(f"everything of this run is kept in {directory}")
        raise
    verdict = checker.judge(history)
    kept = verdict.kept and quiet_seconds is not None
    report = _report(seed, options, history, verdict, done, moot, quiet_seconds, directory)
    if kept and not options.keep:
        shutil.rmtree(directory)
        return report
    _keep(directory, report, verdict, history, done)
    for sentence in (*verdict.sentences[:20], *([] if quiet_seconds is not None else ["it never came to rest"])):
        say(sentence)
    say(f"logs, schedule and history are kept in {directory}")
    return report


def _befall_all(
    stage: Stage, faults: list[Fault], seconds: float, say: Say
) -> tuple[list[tuple[Fault, float]], list[Fault]]:
    """Begin and end each fault in its time; return those that took place, with when they ended, and the others.

    The schedule's clock stands still while a fault begins or ends: on a busy machine a copy of Postgres takes seconds,
    and the pause after it must be a pause all the same.
    """
    waiting, moot = list(faults), []
    going: list[tuple[Fault, AbstractContextManager[None]]] = []
    done: list[tuple[Fault, float]] = []
    began = time.monotonic()
    stage.keep_writing()
    try:
        while (now := time.monotonic() - began) < seconds or going:
            for fault, befalling in [one for one in going if one[0].ends_at <= now]:
                going.remove((fault, befalling))
                ends = time.monotonic()
                befalling.__exit__(None, None, None)
                began += time.monotonic() - ends
                done.append((fault, real_time()))
            if waiting and waiting[0].at <= now:
                fault = waiting.pop(0)
                say(str(fault))
                befalling = befall(stage, fault)
                begins = time.monotonic()
                try:
                    befalling.__enter__()
                    going.append((fault, befalling))
                except (Moot, psutil.Error, psycopg.Error, redis.RedisError) as why:
                    say(f"         it found nothing to befall: {why}".rstrip())
                    moot.append(fault)
                began += time.monotonic() - begins
            stage.keep_writing()
            time.sleep(_TURN_SECONDS)  # a pace: faults begin and end within this of their time
    finally:
        for _, befalling in reversed(going):
            befalling.__exit__(None, None, None)
    return done, moot


def _report(
    seed: int,
    options: Options,
    history: History,
    verdict: checker.Verdict,
    done: list[tuple[Fault, float]],
    moot: list[Fault],
    quiet_seconds: float | None,
    directory: Path,
) -> Report:
    kept = verdict.kept and quiet_seconds is not None
    return Report(
        seed=seed,
        seconds=options.seconds,
        kept_promises=kept,
        faults=dict(sorted(Counter(fault.kind for fault, _ in done).items())),
        moot=dict(sorted(Counter(fault.kind for fault in moot).items())),
        events=len(history.committed),
        effects=len(history.effects),
        rolled_back=history.rolled_back,
        forgotten=sum(event.answered for event in history.forgotten.values()),
        lost=len(verdict.lost),
        doubled=len(verdict.doubled),
        never_committed=len(verdict.never_committed),
        phantoms=len(verdict.phantoms),
        out_of_order=len(verdict.out_of_order),
        wrong_sums=len(verdict.wrong_sums),
        mistakes=len(history.mistakes),
        unreported=len(verdict.unreported),
        longest_stall_seconds=round(checker.longest_stall_seconds(history), 2),
        recovery_seconds={
            kind: round(max(found), 2) for kind, found in checker.recovery_seconds(history, done).items()
        },
        quiet_seconds=None if quiet_seconds is None else round(quiet_seconds, 1),
        directory=None if kept and not options.keep else str(directory),
    )


def _keep(
    directory: Path, report: Report, verdict: checker.Verdict, history: History, done: list[tuple[Fault, float]]
) -> None:
    (directory / "report.json").write_text(json.dumps(report.as_json(), indent=1))
    (directory / "broken.txt").write_text("".join(f"{sentence}\n" for sentence in verdict.sentences))
    with (directory / "history.jsonl").open("w") as file:
        for event in history.committed.values():
            file.write(json.dumps({"committed": asdict(event)}) + "\n")
        for one in history.forgotten.values():
            file.write(json.dumps({"forgotten": asdict(one)}) + "\n")
        for effect in history.effects:
            file.write(json.dumps({"effect": asdict(effect)}) + "\n")
        for fault, ended_at in done:
            file.write(json.dumps({"fault": fault.as_json(), "ended_at": ended_at}) + "\n")
    # The tables, the messages and the keys are in there too: start the servers on it to look.
