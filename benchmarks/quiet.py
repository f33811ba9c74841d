"""What it costs when nothing happens (`idle`), and how memory behaves under a large backlog (`memory`)."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks import seeding
from benchmarks.footprint import Footprint
from benchmarks.harness import Options, Process, Scene, Stage
from benchmarks.processor import family
from benchmarks.report import Report
from benchmarks.throughput import drained, until_acted_on
from dovecote.route import queues
from workers.routes import ROUTES

_STATEMENT = re.compile(rb"LOG:  (?:statement|execute)")


def idle(stage: Stage, options: Options) -> Report:
    """Per cent of one core that relay and the consumers of every queue use together."""
    seconds = 8.0 if options.quick else 30.0
    measured: dict[str, list[float]] = {"ours": []}
    statements: list[float] = []
    parts: dict[str, float] = {}
    for _ in options.repeat(quick=1):
        with stage.scene() as scene:
            scene.start_relay()
            for queue in _four_queues():
                scene.start_consumers(queues=queue)
            # What is measured is that nothing happens for so long; the start must be over first.
            time.sleep(3.0)
            used, count = _used(scene.processes), _statements(stage)
            time.sleep(seconds)
            parts = {
                name: round(100 * (after - used[name]) / seconds, 3) for name, after in _used(scene.processes).items()
            }
            measured["ours"].append(sum(parts.values()))
            statements.append((_statements(stage) - count) / seconds)
    middle = sorted(measured["ours"])[len(measured["ours"]) // 2]
    return Report(
        name="idle",
        unit="% of one core",
        reach="at most 2 % of one core together, at most 5 statements/s on Postgres",
        rounds=measured,
        reached=middle <= 2 and max(statements) <= 5,
        less_is_better=True,
        details={
            "statements_per_second": [round(one, 2) for one in statements],
            "cpu_percent_of_each": parts,
            "queues": _four_queues(),
            "not_measured": "the console, which does not exist yet",
            "seconds": seconds,
        },
    )


idle.postgres_settings = {"log_statement": "all"}  # type: ignore[attr-defined]


def _four_queues() -> list[str]:
    """Return the queue of each consumer process; where there are fewer than four, the first has two."""
    names = queues(ROUTES)
    return [*names, *names[: max(0, 4 - len(names))]]


def memory(stage: Stage, options: Options) -> Report:
    """MB by which relay and worker grow, whichever grows more, while a large backlog is drained."""
    events = options.size(1_000_000, 100_000)
    grown: dict[str, list[float]] = {"ours": []}
    parts: dict[str, float] = {}
    for number in options.repeat(full=1, quick=1):
        with stage.scene() as scene:
            footprint = Footprint(scene)
            parts = _grown_mb(scene, events)
            grown["ours"].append(max(parts.values()))
            footprint.mark(events)
            if number == 0:
                drained(scene, events)
                footprint.mark(events)
                kept = footprint
    return Report(
        name="memory",
        unit="MB",
        reach="relay and worker grow at most 50 MB over their start; nothing dead or bloated",
        rounds=grown,
        reached=max(grown["ours"]) <= 50 and kept.is_clean,
        less_is_better=True,
        details={"grown_mb": parts, "events": events, **kept.details()},
    )


def _grown_mb(scene: Scene, events: int) -> dict[str, float]:
    """Drain a backlog; return by how many MB relay and worker grew over their start."""
    consumers = scene.start_consumers()
    with scene.relay_on_standby():
        relay = scene.processes[-1]
        seeding.outbox(scene, events)
        before = {"relay": _rss(relay), "worker": _rss(consumers)}
    with _watching(relay, consumers) as most:
        until_acted_on(scene, events)
    scene.stop_processes()
    return {name: round((most[name] - before[name]) / 1e6, 1) for name in before}


@contextmanager
def _watching(relay: Process, consumers: Process) -> Iterator[dict[str, int]]:
    most = {"relay": 0, "worker": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            most["relay"] = max(most["relay"], _rss(relay))
            most["worker"] = max(most["worker"], _rss(consumers))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _rss(process: Process) -> int:
    """Return the largest resident size among a process and its children: of Dramatiq's, that is the worker."""
    return max(one.memory_info().rss for one in family(process))


def _used(processes: Sequence[Process]) -> dict[str, float]:
    """Return the processor seconds each has used with its children."""
    return {
        f"{number} {process.name}": sum(sum(one.cpu_times()[:2]) for one in family(process))
        for number, process in enumerate(processes)
    }


def _statements(stage: Stage) -> int:
    """Count what Postgres logged; with servers of ours it logs every statement."""
    log = stage.directory / "servers" / "postgres" / "log"
    return len(_STATEMENT.findall(log.read_bytes())) if log.exists() else 0
