"""How cost grows: events/s and latency against consumer processes, bundle size, and offered load."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import plots
from benchmarks.harness import Options, Scene, Stage
from benchmarks.offered import offer
from benchmarks.probe import is_noted, notes
from benchmarks.report import Report, percentile
from benchmarks.seeding import QUOTES
from benchmarks.throughput import OUR_THREADS, consumed, relayed, until_acted_on

# At which latency is compared between numbers of processes and between bundle sizes: a busy service.
PER_SECOND = 1_000
_USUAL_BUNDLE = 500
_PROCESSES, _BUNDLES = (1, 2, 3, 4), (1, 10, 50, 100, 200, 500, 1_000)
_LOADS = (10, 30, 100, 300, 1_000, 3_000, 5_000, 7_500, 10_000, 15_000, 20_000, 30_000, 50_000)
_NOTED_PER_SECOND = 2_000

Point = dict[str, Any]


@dataclass(frozen=True)
class _Size:
    """How much one point measures."""

    events: int
    seconds: float


def scale(stage: Stage, options: Options) -> Report:
    """Events a second: the best of the curves; the curves are in the details and in benchmarks/plots."""
    size = _Size(options.size(50_000, 10_000), 1.5 if options.quick else 5.0)
    processes, bundles = ((1, 2), (10, 500)) if options.quick else (_PROCESSES, _BUNDLES)
    loads = (100, 1_000, 3_000) if options.quick else _LOADS
    found: dict[str, list[list[Point]]] = {"processes": [], "bundle_size": [], "load": []}
    for number in options.repeat():
        usual = _point(stage, size, 1, _USUAL_BUNDLE)
        found["processes"].append([usual if n == 1 else _point(stage, size, n, _USUAL_BUNDLE) for n in processes])
        options.say(f"round {number + 1}: processes {found['processes'][-1]}")
        found["bundle_size"].append([usual if b == _USUAL_BUNDLE else _point(stage, size, 1, b) for b in bundles])
        options.say(f"round {number + 1}: bundle sizes {found['bundle_size'][-1]}")
        found["load"].append(_loads(stage, size.seconds, loads))
        options.say(f"round {number + 1}: loads {found['load'][-1]}")
    curves = {f"by_{name}": _middle(rounds, name) for name, rounds in found.items()}
    best = [max(point["events_per_second"] for point in points) for points in found["processes"]]
    return Report(
        name="scale",
        unit="events/s",
        reach="nothing is demanded; it shows how cost grows",
        rounds={"ours": best},
        reached=True,
        details={
            **curves,
            "events": size.events,
            "latency_at_events_per_second": PER_SECOND,
            "threads": OUR_THREADS,
            "plots": plots.draw(curves, PER_SECOND, plots.ROUGH if options.quick else plots.SHOWN),
        },
    )


def _point(stage: Stage, size: _Size, processes: int, bundle_size: int) -> Point:
    """Measure one number of processes and one bundle size: a backlog first, then latency at a steady rate."""
    # A bundle of one is a message and a transaction for each event: a fifth of them is enough.
    events = size.events if bundle_size >= 50 else size.events // 5
    relay = ("benchmarks.rebundled", str(bundle_size))
    with stage.scene() as scene:
        to_queues = events / relayed(scene, events, words=relay)
        scene.stop_processes()
        to_effects = events / consumed(scene, events, processes=processes, probe=scene.directory / "probe")
        scene.start_relay(relay)
        steady = _steady(scene, PER_SECOND, size.seconds)
    return {
        "processes": processes,
        "bundle_size": bundle_size,
        "relay_events_per_second": round(to_queues, 1),
        "events_per_second": round(to_effects, 1),
        **{name: steady[name] for name in ("p50_ms", "p99_ms")},
    }


def _loads(stage: Stage, seconds: float, loads: Iterable[int]) -> list[Point]:
    """Offer more and more to one relay and one process of consumers, until they no longer keep up."""
    points: list[Point] = []
    with stage.scene() as scene:
        noted_one_in = 0
        for load in loads:
            one_in = max(1, load // _NOTED_PER_SECOND)
            if one_in != noted_one_in:
                _start(scene, one_in)
                noted_one_in = one_in
            points.append(_steady(scene, load, seconds, one_in))
            if not points[-1]["kept_up"]:
                break
    return points


def _start(scene: Scene, one_in: int) -> None:
    """Start the relay and consumers that note one event in so many."""
    scene.stop_processes()
    probe = {"BENCH_PROBE": str(scene.directory / "probe"), "BENCH_PROBE_ONE_IN": str(one_in)}
    scene.start_consumers("benchmarks.probe:ours", threads=OUR_THREADS, more=probe)
    scene.start_relay()


def _steady(scene: Scene, load: int, seconds: float, one_in: int = 1) -> Point:
    """Offer a load; return what was achieved until the last effect, and the latency of the sample."""
    done = scene.one(QUOTES.effects)
    began = time.time()
    offered = offer(scene.database_url, load, seconds)
    took = until_acted_on(scene, done + len(offered.committed)) - began
    reached = notes(scene.directory / "probe")
    # The first half second warms connections, plans and caches up.
    ends = min(offered.committed.values()) + 500_000_000
    sample = {id: at for id, at in offered.committed.items() if at > ends and is_noted(id, one_in)}
    scene.until(
        lambda: reached.update(notes(scene.directory / "probe")) or sample.keys() <= reached.keys(), 10, "noted"
    )
    waits = [(reached[id] - at) / 1e6 for id, at in sample.items()]
    return {
        "load": load,
        "events_per_second": round(len(offered.committed) / max(took, seconds), 1),
        "kept_up": took <= 1.1 * seconds + 0.1,
        "p50_ms": round(percentile(waits, 0.5), 2),
        "p99_ms": round(percentile(waits, 0.99), 2),
        "measured": len(waits),
    }


def _middle(rounds: list[list[Point]], by: str) -> list[Point]:
    """Return the medians of all rounds' points of each place on the curve."""
    places: dict[Any, list[Point]] = defaultdict(list)
    for points in rounds:
        for point in points:
            places[point[by]].append(point)
    return [
        {name: all(values) if isinstance(values[0], bool) else median(values) for name, values in _columns(points)}
        for _, points in sorted(places.items())
    ]


def _columns(points: list[Point]) -> list[tuple[str, list[Any]]]:
    return [(name, [point[name] for point in points]) for name in points[0]]
