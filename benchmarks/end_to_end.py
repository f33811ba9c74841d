"""Everything at once: eight writers as fast as they can, relay and consumers on the same processors."""

import time
from statistics import median

from benchmarks import naive, pgbench
from benchmarks.harness import Options, Scene, Stage
from benchmarks.report import Report, ratio


def end_to_end(stage: Stage, options: Options) -> Report:
    """Events a second, from the first write until every effect is committed."""
    seconds = 5 if options.quick else 20
    rounds: dict[str, list[float]] = {"ours": [], "naive": []}
    written: dict[str, list[float]] = {"ours": [], "naive": []}
    lag: dict[str, list[float]] = {"ours": [], "naive": []}
    dead: dict[str, int] = {}
    for number in options.repeat():
        for name in rounds:
            with stage.scene() as scene:
                _start(scene, name)
                count, write_seconds, lag_seconds = _write_and_wait(scene, name, seconds)
                rounds[name].append(count / (write_seconds + lag_seconds))
                written[name].append(count / write_seconds)
                lag[name].append(lag_seconds)
                if name == "ours":
                    scene.stop_processes()
                    dead = scene.dead_tuples()
        options.say(f"round {number + 1}: {rounds} lag {lag}")
    return Report(
        name="end-to-end",
        unit="events/s",
        reach="at least 6 times naive; lag back to 0 within 2 s of the last write",
        rounds=rounds,
        reached=(ratio(rounds, "naive") or 0) >= 6 and median(lag["ours"]) <= 2,
        details={
            "lag_seconds": {name: round(median(values), 3) for name, values in lag.items()},
            "written_per_second": {name: round(median(values), 1) for name, values in written.items()},
            "seconds": seconds,
            "n_dead_tup": dead,
        },
    )


def _start(scene: Scene, name: str) -> None:
    if name == "ours":
        scene.start_consumers(processes=1, threads=2)
        scene.start_relay()
    else:
        scene.connection.execute(naive.SCHEMA)
        scene.start_consumers("benchmarks.naive:broker", processes=2, threads=4)
        scene.start_naive_relay(NAIVE_POLL_SECONDS="0.05")


def _write_and_wait(scene: Scene, name: str, seconds: int) -> tuple[int, float, float]:
    """Return events written, the seconds that took, and the seconds until the last effect after that."""
    script = pgbench.with_event("dovecote.outbox" if name == "ours" else "naive.outbox")
    began = time.monotonic()
    count = pgbench.write(scene, script, seconds).transactions
    ended = time.monotonic()
    scene.until(
        lambda: scene.one("select sum(quotes_applied) from dovecote.latest_prices") == count,
        900,
        f"{count} effects are committed",
        every=0.02,
    )
    return count, ended - began, time.monotonic() - ended
