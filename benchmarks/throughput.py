"""How fast a backlog moves: to the queues (`relay`), from the queues (`consume`), all the way (`drain`)."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

from benchmarks import limit, naive, seeding
from benchmarks.harness import Options, Scene, Stage
from benchmarks.report import Report, ratio

Rounds = dict[str, list[float]]

_WITHIN_SECONDS = 600.0
# Tuned down from the second a user would write: here it is about throughput.
_POLL = {"NAIVE_POLL_SECONDS": "0.05"}
# What was quickest on two cores; see benchmarks/README.md.
_OUR_CONSUMERS = {"processes": 1, "threads": 2}
_NAIVE_CONSUMERS = {"processes": 2, "threads": 4}


def relay(stage: Stage, options: Options) -> Report:
    """Committed events to the queues."""
    events = options.size(100_000, 50_000)
    rounds: Rounds = {"ours": [], "naive": [], "limit": []}
    of_rows: list[float] = []
    dead: dict[str, int] = {}
    for number in options.repeat(quick=2):
        with stage.scene() as scene:
            rounds["ours"].append(events / relayed(scene, events))
            rounds["limit"].append(events / limit.run(scene))
            of_rows.append(events / limit.run(scene, limit.ROWS))
            scene.stop_processes()
            dead = scene.dead_tuples()
        rounds["naive"].append(naive_relay(stage, events // 5))
        options.say(_said(number, rounds))
    times_naive, of_limit = ratio(rounds, "naive") or 0, ratio(rounds, "limit") or 0
    return Report(
        name="relay",
        unit="events/s",
        reach="at least 16 times naive and 0.4 of the limit",
        rounds=rounds,
        reached=times_naive >= 16 and of_limit >= 0.4,
        details={
            "events": events,
            "naive_events": events // 5,
            "limit_of_bare_rows": round(median(of_rows), 1),
            "n_dead_tup": dead,
        },
    )


def relayed(scene: Scene, events: int) -> float:
    """Commit events, let a relay lead; return the seconds from then until the last one was published."""
    published = "select coalesce(sum(events), 0) from dovecote.published_batches"
    wanted = scene.one(published) + events
    with scene.relay_on_standby():
        seeding.outbox(scene, events)
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
    events = options.size(100_000, 50_000)
    rounds: Rounds = {"ours": [], "naive": []}
    for number in options.repeat():
        with stage.scene() as scene:
            queue_ours(scene, events)
            rounds["ours"].append(events / _consumed(scene, events, partial(_our_consumers, scene, 1)))
        with stage.scene() as scene:
            _queue_naive(scene, events // 10)
            seconds = _consumed(scene, events // 10, partial(_naive_consumers, scene, 1, 8))
            rounds["naive"].append(events // 10 / seconds)
        options.say(_said(number, rounds))
    return Report(
        name="consume",
        unit="events/s",
        reach="at least 16 times naive",
        rounds=rounds,
        reached=(ratio(rounds, "naive") or 0) >= 16,
        details={"events": events, "naive_events": events // 10},
    )


def drain(stage: Stage, options: Options) -> Report:
    """A committed backlog to committed effects, relay and consumers at once."""
    events = options.size(100_000, 50_000)
    rounds: Rounds = {"ours": [], "naive": []}
    dead: dict[str, int] = {}
    for number in options.repeat():
        with stage.scene() as scene:
            _our_consumers(scene, _OUR_CONSUMERS["processes"])
            with scene.relay_on_standby():
                seeding.outbox(scene, events)
            acted_on_at = _until_acted_on(scene, events)
            rounds["ours"].append(events / (acted_on_at - _leads_since(scene)))
            scene.stop_processes()
            dead = scene.dead_tuples()
        with stage.scene() as scene:
            scene.connection.execute(naive.SCHEMA)
            _naive_consumers(scene, **_NAIVE_CONSUMERS)
            scene.start_naive_relay(**_POLL)
            committed_at = seeding.naive_outbox(scene, events // 10)
            rounds["naive"].append(events // 10 / (_until_acted_on(scene, events // 10) - committed_at))
        options.say(_said(number, rounds))
    return Report(
        name="drain",
        unit="events/s",
        reach="at least 15 times naive",
        rounds=rounds,
        reached=(ratio(rounds, "naive") or 0) >= 15,
        details={"events": events, "naive_events": events // 10, "n_dead_tup": dead},
    )


def queue_ours(scene: Scene, events: int) -> None:
    """Let the relay queue events that nobody consumes yet."""
    relayed(scene, events)
    scene.stop_processes()


def _queue_naive(scene: Scene, events: int) -> None:
    scene.connection.execute(naive.SCHEMA)
    seeding.naive_outbox(scene, events)
    relay = scene.start("naive-relay", ["benchmarks.naive"], **_POLL)
    _until_naive_is_sent(scene)
    relay.stop()


def _consumed(scene: Scene, events: int, start: Callable[[], object]) -> float:
    """Return the seconds from the queue's appearing to the last effect.

    The queue is put aside while the process starts, which takes a second and is not what is measured.
    """
    keys = [f"{scene.namespace}:pricing.msgs", f"{scene.namespace}:pricing"]
    for key in keys:
        scene.client.rename(key, f"{key}.aside")
    start()
    pipeline = scene.client.pipeline()
    for key in keys:
        pipeline.rename(f"{key}.aside", key)
    pipeline.execute()
    began_at = time.time()
    return _until_acted_on(scene, events) - began_at


def _our_consumers(scene: Scene, processes: int) -> None:
    scene.start_consumers(processes=processes, threads=_OUR_CONSUMERS["threads"])


def _naive_consumers(scene: Scene, processes: int, threads: int) -> None:
    scene.start_consumers("benchmarks.naive:broker", processes=processes, threads=threads)


def _until_acted_on(scene: Scene, events: int) -> float:
    """Return the moment (Unix) at which every effect was seen committed."""
    scene.until(
        lambda: scene.one("select sum(quotes_applied) from dovecote.latest_prices") == events,
        _WITHIN_SECONDS,
        f"{events} effects are committed",
        every=0.025,
    )
    return time.time()


def _until_naive_is_sent(scene: Scene) -> None:
    todo = "select exists (select from naive.outbox where processed_at is null)"
    scene.until(lambda: not scene.one(todo), _WITHIN_SECONDS, "the naive relay has sent everything", every=0.1)


def _leads_since(scene: Scene) -> float:
    return _last(scene, "owned_since from dovecote.relay_state")


def _last(scene: Scene, moment: str) -> float:
    return float(scene.one(f"select extract(epoch from {moment.replace(' from', ') from', 1)}"))  # noqa: S608 - our own words


def _said(number: int, rounds: Rounds) -> str:
    return f"round {number + 1}: " + ", ".join(f"{name} {measured[-1]:,.0f}" for name, measured in rounds.items())
