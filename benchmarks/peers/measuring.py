"""`peers`: the same three questions to each, in alternating rounds.

relay     events/s from a committed backlog to the queues, where there is such a hop
effects   events/s from a committed backlog to committed effects, everything running
latency   from the commit to the handler's first line, at 20 events/s at random times
"""

import time
from collections.abc import Mapping
from statistics import median
from uuid import UUID

from benchmarks.harness import Options, Scene, Stage
from benchmarks.offered import offer
from benchmarks.peers.catalogue import PEERS, PROBE, Peer
from benchmarks.probe import notes
from benchmarks.report import Report, percentile, ratio
from benchmarks.seeding import QUOTES
from benchmarks.throughput import until_acted_on

_RATE = 20
_WITHIN_SECONDS = 300.0
_INSTALL = "in the checkout, .venv/bin/pip install -e '.[peers]' brings it"

Measured = dict[str, dict[str, list[float]]]


def peers(stage: Stage, options: Options) -> Report:
    """Events a second from a committed backlog to committed effects; relays and latencies in the details."""
    events = options.size(50_000, 5_000)
    seconds = 0.7 if options.quick else 10.0
    here = [peer for peer in PEERS if not peer.missing]
    found: Measured = {name: {peer.name: [] for peer in here} for name in ("relay", "effects", "p50_ms", "p99_ms")}
    for number in options.repeat():
        for peer in here:
            # The naive relay has a benchmark of its own.
            if not (options.quick and peer.name == "naive"):
                _measure_relay(stage, peer, int(events * peer.share), found)
            _measure(stage, peer, int(events * peer.share), seconds, found)
        options.say(f"round {number + 1}: {found}")
    others = [peer.name for peer in here if peer.name != "ours"]
    middle = {
        what: {name: round(median(values), 2) for name, values in by.items() if values} for what, by in found.items()
    }
    behind = _behind(middle)
    return Report(
        name="peers",
        unit="events/s",
        reach="quicker than each at its best: relay, to effects, latency",
        rounds=found["effects"],
        reached=not behind,
        details={
            "relay_events_per_second": middle["relay"],
            "effects_events_per_second": middle["effects"],
            "latency_ms_at_20_per_second": {
                name: {"p50": middle["p50_ms"][name], "p99": middle["p99_ms"][name]} for name in middle["p50_ms"]
            },
            "times_each": {name: round(ratio(found["effects"], name) or 0, 2) for name in others},
            "not_the_best": behind,
            "skipped": {
                peer.name: f"{', '.join(peer.missing)} not installed; {_INSTALL}" for peer in PEERS if peer.missing
            },
            "events": {peer.name: int(events * peer.share) for peer in here},
        },
    )


def _measure_relay(stage: Stage, peer: Peer, events: int, found: Measured) -> None:
    if peer.relay and peer.seed and peer.published:
        with stage.scene() as scene:
            peer.schema(scene)
            peer.relay(scene)
            began = _seed(scene, peer.seed, events)
            published = peer.published
            scene.until(lambda: scene.one(published), _WITHIN_SECONDS, f"{peer.name} has published {events} events")
            found["relay"][peer.name].append(events / (time.time() - began))


def _measure(stage: Stage, peer: Peer, events: int, seconds: float, found: Measured) -> None:
    with stage.scene() as scene:
        peer.schema(scene)
        peer.everything(scene)
        waits = _waits(scene, peer, seconds)
        found["p50_ms"][peer.name].append(percentile(waits, 0.5))
        found["p99_ms"][peer.name].append(percentile(waits, 0.99))
        done = int(scene.one(QUOTES.effects))
        if peer.seed:
            began = _seed(scene, peer.seed, events)
        else:
            began = min(_sent(scene, "backlog", str(events)).values()) / 1e9
        found["effects"][peer.name].append(events / (until_acted_on(scene, done + events) - began))


def _seed(scene: Scene, statement: str, events: int) -> float:
    scene.connection.execute(statement.encode(), (events,))
    return time.time()


def _waits(scene: Scene, peer: Peer, seconds: float) -> list[float]:
    """Return milliseconds from commit to handler; the first half second warms up."""
    committed = (
        offer(scene.database_url, _RATE, seconds + 0.5, peer.insert).committed
        if peer.insert
        else _sent(scene, "steady", str(seconds + 0.5), str(_RATE))
    )
    reached: dict[UUID, int] = {}
    probe = scene.directory / PROBE
    scene.until(
        lambda: reached.update(notes(probe)) or committed.keys() <= reached.keys(), 60, f"{peer.name} has handled all"
    )
    until_acted_on(scene, len(committed))
    start = min(committed.values()) + 500_000_000
    return [(reached[id] - at) / 1e6 for id, at in committed.items() if at >= start]


def _sent(scene: Scene, *words: str) -> dict[UUID, int]:
    """Let Dramatiq alone send; return when what was committed or begun."""
    file = scene.directory / f"sent-{words[0]}"
    scene.start("sender", ["benchmarks.peers.raw_dramatiq", *words], BENCH_SENT=str(file))
    scene.until(file.exists, _WITHIN_SECONDS, "the sender has sent all")
    return notes(file)


def _behind(middle: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say where somebody is better than we are."""
    return [
        f"{what}: {name} {value:,.2f}, ours {by_name['ours']:,.2f}"
        for what, by_name in middle.items()
        for name, value in by_name.items()
        if name != "ours" and (value < by_name["ours"] if what.endswith("_ms") else value > by_name["ours"])
    ]
