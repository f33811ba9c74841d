"""Everything at once: eight writers as fast as they can, relay and consumers on the same processors.

As fast as they can means several events a transaction, as a price feed writes them: with one each, the
round trips of the writers are most of what is measured. That is measured too (`one_event_a_transaction`).
"""

import time
from dataclasses import dataclass
from statistics import median

from benchmarks import naive, pgbench
from benchmarks.harness import Options, Stage
from benchmarks.report import Report, ratio
from benchmarks.scene import Scene

_EVENTS_A_TRANSACTION = 5


@dataclass
class _Run:
    """Events written, the seconds that took, and the seconds until the last effect after that."""

    events: int
    write_seconds: float
    lag_seconds: float

    @property
    def per_second(self) -> float:
        return self.events / (self.write_seconds + self.lag_seconds)


def end_to_end(stage: Stage, options: Options) -> Report:
    """Events a second, from the first write until every effect is committed."""
    runs: dict[str, list[_Run]] = {"ours": [], "naive": []}
    alone: dict[str, _Run] = {}
    dead: dict[str, int] = {}
    for number in options.repeat():
        for name, done in runs.items():
            with stage.scene() as scene:
                done.append(_run(scene, name, _seconds(options, name), _EVENTS_A_TRANSACTION))
                if name == "ours":
                    scene.stop_processes()
                    dead = scene.dead_tuples()
            options.say(f"round {number + 1}, {name}: {done[-1]}")
    for name in runs:
        with stage.scene() as scene:
            alone[name] = _run(scene, name, _seconds(options, name) / 2, 1)
    rounds = {name: [run.per_second for run in done] for name, done in runs.items()}
    lag = {name: median(run.lag_seconds for run in done) for name, done in runs.items()}
    return Report(
        name="end-to-end",
        unit="events/s",
        reach="at least 6 times naive; lag back to 0 within 2 s of the last write",
        rounds=rounds,
        reached=(ratio(rounds, "naive") or 0) >= 6 and lag["ours"] <= 2,
        details={
            "events_a_transaction": _EVENTS_A_TRANSACTION,
            "lag_seconds": {name: round(seconds, 3) for name, seconds in lag.items()},
            "written_per_second": {
                name: round(median(run.events / run.write_seconds for run in done), 1) for name, done in runs.items()
            },
            "seconds": {name: _seconds(options, name) for name in runs},
            "one_event_a_transaction": {name: round(run.per_second, 1) for name, run in alone.items()},
            "n_dead_tup": dead,
        },
    )


def _seconds(options: Options, name: str) -> float:
    # The naive side takes minutes for what is written in seconds. A shorter run favours it.
    full = 5.0 if options.quick else 20.0
    return full if name == "ours" else full / 5


def _start(scene: Scene, name: str) -> None:
    if name == "ours":
        scene.start_consumers(processes=1, threads=2)
        scene.start_relay()
    else:
        scene.connection.execute(naive.SCHEMA)
        scene.start_consumers("benchmarks.naive:broker", processes=2, threads=4)
        scene.start_naive_relay(NAIVE_POLL_SECONDS="0.05")


def _run(scene: Scene, name: str, seconds: float, events: int) -> _Run:
    _start(scene, name)
    table = "dovecote.outbox" if name == "ours" else "naive.outbox"
    script = pgbench.with_event(table) if events == 1 else pgbench.with_events(table, events)
    began = time.monotonic()
    count = pgbench.write(scene, script, seconds).transactions * events
    ended = time.monotonic()
    scene.until(
        lambda: scene.one("select sum(quotes_applied) from dovecote.latest_prices") == count,
        900,
        f"{count} effects are committed",
        every=0.02,
    )
    return _Run(count, ended - began, time.monotonic() - ended)
