"""How fast a backlog moves: to the queues (`relay`), from the queues (`consume`, `ordinary`), all the way (`drain`)."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import limit, naive, processor, seeding
from benchmarks.footprint import Footprint
from benchmarks.harness import Options, Scene, Stage
from benchmarks.report import Report, ratio
from benchmarks.seeding import PAYMENTS, QUOTES, Load

Rounds = dict[str, list[float]]

_WITHIN_SECONDS = 600.0
_RELAY = ("workers.relay",)
# Tuned down from the second a user would write: here it is about throughput.
_POLL = {"NAIVE_POLL_SECONDS": "0.05"}
# What was quickest on two cores; see benchmarks/README.md.
OUR_THREADS = 2
NAIVE_PROCESSES, NAIVE_THREADS = 2, 4
_NAIVE_THREADS_OF_ONE_PROCESS = 8


def relay(stage: Stage, options: Options) -> Report:
    """Committed events to the queues."""
    events = options.size(100_000, 50_000)
    rounds: Rounds = {"ours": [], "naive": [], "limit": []}
    of_rows: list[float] = []
    for number in options.repeat(quick=2):
        with stage.scene() as scene:
            footprint = Footprint(scene)
            empty = _redis_bytes(scene)
            rounds["ours"].append(events / relayed(scene, events))
            queued = (_redis_bytes(scene) - empty) / events
            rounds["limit"].append(events / limit.run(scene))
            of_rows.append(events / limit.run(scene, limit.ROWS))
            scene.stop_processes()
            footprint.mark(events)
            if number == 0:
                relayed(scene, events)
                scene.stop_processes()
                footprint.mark(events)
                kept = footprint
        rounds["naive"].append(naive_relay(stage, events // 5))
        options.say(_said(number, rounds))
    times_naive, of_limit = ratio(rounds, "naive") or 0, ratio(rounds, "limit") or 0
    return Report(
        name="relay",
        unit="events/s",
        reach="at least 16 times naive and 0.4 of the limit; nothing dead or bloated",
        rounds=rounds,
        reached=times_naive >= 16 and of_limit >= 0.4 and kept.is_clean,
        details={
            "events": events,
            "naive_events": events // 5,
            "limit_of_bare_rows": round(median(of_rows), 1),
            "redis_bytes_per_queued_event": round(queued, 1),
            **kept.details(),
        },
    )


def relayed(scene: Scene, events: int, load: Load = QUOTES, words: Sequence[str] = _RELAY, **more: str) -> float:
    """Commit events, let a relay lead; return the seconds from then until the last one was published."""
    published = "select coalesce(sum(events), 0) from dovecote.published_batches"
    wanted = scene.one(published) + events
    with scene.relay_on_standby(words, **more):
        seeding.outbox(scene, events, load)
    scene.until(
        lambda: scene.one(published) == wanted,
        _WITHIN_SECONDS,
        f"{events} events are published",
    )
    return _last(scene, "max(published_at) from dovecote.published_batches") - _leads_since(scene)


def naive_relay(stage: Stage, events: int) -> float:
    """Return the events/s of the naive relay."""
    with stage.scene() as scene:
        scene.connection.execute(naive.SCHEMA)
        scene.start_naive_relay(**_POLL)
        committed_at = seeding.naive_outbox(scene, events)
        _until_naive_is_sent(scene)
        return events / (_last(scene, "max(processed_at) from naive.outbox") - committed_at)


def consume(stage: Stage, options: Options) -> Report:
    """Queued price updates to committed effects, in one process."""
    return _from_the_queue(stage, options, "consume", QUOTES, options.size(100_000, 50_000))


def ordinary(stage: Stage, options: Options) -> Report:
    """Queued payments to lines of billing's history: an ordinary, ordered handler, called with one event each."""
    return _from_the_queue(stage, options, "ordinary", PAYMENTS, options.size(50_000, 20_000), wanted=2)


def _from_the_queue(stage: Stage, options: Options, name: str, load: Load, events: int, wanted: float = 16) -> Report:
    rounds: Rounds = {"ours": [], "naive": []}
    for number in options.repeat():
        with stage.scene() as scene:
            footprint = Footprint(scene)
            # The relay stays: it sends again what an ordered handler had to put behind an earlier event.
            relayed(scene, events, load)
            rounds["ours"].append(events / consumed(scene, events, load))
            scene.stop_processes()
            footprint.mark(events)
        with stage.scene() as scene:
            rounds["naive"].append(events // 10 / _naive_consumed(scene, events // 10, load))
        options.say(_said(number, rounds))
    return Report(
        name=name,
        unit="events/s",
        reach=f"at least {wanted:g} times naive" + (" (nobody demands it: shown)" if name == "ordinary" else ""),
        rounds=rounds,
        reached=(ratio(rounds, "naive") or 0) >= wanted and footprint.is_clean,
        details={"events": events, "naive_events": events // 10, **footprint.details()},
    )


def consumed(scene: Scene, events: int, load: Load = QUOTES, processes: int = 1, probe: Path | None = None) -> float:
    """Return the seconds that our consumers took for what is queued; with a probe they note when."""
    module = "benchmarks.probe:ours" if probe else "workers.consumers:start"
    more = {"BENCH_PROBE": str(probe)} if probe else {}
    return _from_appearing(
        scene,
        load,
        events,
        lambda: scene.start_consumers(module, queues=load.queue, processes=processes, threads=OUR_THREADS, more=more),
    )


def _naive_consumed(scene: Scene, events: int, load: Load) -> float:
    scene.connection.execute(naive.SCHEMA)
    seeding.naive_outbox(scene, events, load)
    relay = scene.start_naive_relay(**_POLL)
    _until_naive_is_sent(scene)
    relay.stop()
    return _from_appearing(
        scene, load, events, lambda: start_naive_consumers(scene, 1, _NAIVE_THREADS_OF_ONE_PROCESS, load)
    )


def _from_appearing(scene: Scene, load: Load, events: int, start: Callable[[], object]) -> float:
    """Return the seconds from the queue's appearing to the last effect.

    The queue is renamed while the process starts, which takes a second and is not part of the measurement.
    """
    keys = [f"{scene.namespace}:{load.queue}.msgs", f"{scene.namespace}:{load.queue}"]
    for key in keys:
        scene.client.rename(key, f"{key}.renamed")
    start()
    pipeline = scene.client.pipeline()
    for key in keys:
        pipeline.rename(f"{key}.renamed", key)
    pipeline.execute()
    began_at = time.time()
    return until_acted_on(scene, events, load) - began_at


def drain(stage: Stage, options: Options) -> Report:
    """A committed backlog to committed effects, relay and consumers at once."""
    events = options.size(100_000, 50_000)
    costs: dict[str, float] = {}
    rounds: Rounds = {"ours": [], "naive": []}
    for number in options.repeat():
        with stage.scene() as scene:
            footprint = Footprint(scene)
            rounds["ours"].append(events / drained(scene, events, costs))
            footprint.mark(events)
            if number == 0:
                drained(scene, events)
                footprint.mark(events)
                kept = footprint
        with stage.scene() as scene:
            rounds["naive"].append(events // 10 / naive_drained(scene, events // 10))
        options.say(_said(number, rounds))
    return Report(
        name="drain",
        unit="events/s",
        reach="at least 15 times naive; nothing dead or bloated",
        rounds=rounds,
        reached=(ratio(rounds, "naive") or 0) >= 15 and kept.is_clean,
        details={
            "events": events,
            "naive_events": events // 10,
            "processor_us_per_event": costs,
            **kept.details(),
        },
    )


def drained(scene: Scene, events: int, costs: dict[str, float] | None = None) -> float:
    """Commit events, let relay and consumers at them; return the seconds until the last effect.

    `costs` takes what an event cost each kind of process, in microseconds of one processor.
    """
    done = scene.one(QUOTES.effects)
    scene.start_consumers(threads=OUR_THREADS)
    with scene.relay_on_standby():
        seeding.outbox(scene, events)
        before = processor.used(scene)
    acted_on_at = until_acted_on(scene, done + events)
    if costs is not None:
        costs.update(processor.microseconds_each(before, processor.used(scene), events))
    seconds = acted_on_at - _leads_since(scene)
    scene.stop_processes()
    return seconds


def naive_drained(scene: Scene, events: int) -> float:
    """Do the same with the naive outbox."""
    scene.connection.execute(naive.SCHEMA)
    start_naive_consumers(scene, NAIVE_PROCESSES, NAIVE_THREADS)
    scene.start_naive_relay(**_POLL)
    committed_at = seeding.naive_outbox(scene, events)
    return until_acted_on(scene, events) - committed_at


def start_naive_consumers(scene: Scene, processes: int, threads: int, load: Load = QUOTES) -> None:
    scene.start_consumers("benchmarks.naive:broker", queues=load.queue, processes=processes, threads=threads)


def until_acted_on(scene: Scene, events: int, load: Load = QUOTES) -> float:
    """Return the time (Unix) at which so many effects were seen committed."""
    scene.until(
        lambda: scene.one(load.effects) == events, _WITHIN_SECONDS, f"{events} effects are committed", every=0.025
    )
    return time.time()


def _redis_bytes(scene: Scene) -> int:
    about: Any = scene.client.info("memory")
    return int(about["used_memory"])


def _until_naive_is_sent(scene: Scene) -> None:
    todo = "select exists (select from naive.outbox where processed_at is null)"
    scene.until(lambda: not scene.one(todo), _WITHIN_SECONDS, "the naive relay has sent everything", every=0.1)


def _leads_since(scene: Scene) -> float:
    return _last(scene, "owned_since from dovecote.relay_state")


def _last(scene: Scene, timestamp: str) -> float:
    return float(scene.one(f"select extract(epoch from {timestamp.replace(' from', ') from', 1)}"))  # noqa: S608 - our own words


def _said(number: int, rounds: Rounds) -> str:
    return f"round {number + 1}: " + ", ".join(f"{name} {measured[-1]:,.0f}" for name, measured in rounds.items())
