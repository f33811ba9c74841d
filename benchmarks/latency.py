"""From "commit returned" in the writer to the first line of the handler, at a low rate and at a high one.

Arrivals are random (Poisson), as they are in life: at 20/s one in ten comes within 5 ms of the one before.
Both clocks are this machine's.
"""

import random
import threading
import time
from pathlib import Path
from uuid import UUID

import psycopg

from benchmarks import naive
from benchmarks.harness import Options, Scene, Stage
from benchmarks.report import Report, percentile
from dovecote.events.ids import uuid7

LOW, HIGH = 20, 1_000
_WRITERS = 4
# A user who wants it quick turns both polls down; Dramatiq's own is the time-out of its consumer.
_TUNED = {"NAIVE_POLL_SECONDS": "0.05", "dramatiq_worker_timeout": "50"}

_DOMAIN_ROW = "insert into dovecote.price_quotes (symbol, as_of, price) values (%s, clock_timestamp(), 1)"
_EVENT = """
    insert into {table} (id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (%s, 'price', %s, 'pricing.price_quoted.v1', %s, %s)
"""
_PAYLOAD = '{{"as_of": "{0}", "price": "1.25", "symbol": "{1}", "occurred_at": "{0}", "remark": "{2}"}}'
_HEADERS = '{{"traceparent": "00-{:032x}-{:016x}-00"}}'

Quantiles = dict[str, float]


def latency(stage: Stage, options: Options) -> Report:
    """Milliseconds; the rounds are the medians at the low rate."""
    seconds = 5.0 if options.quick else 30.0
    variants: dict[str, dict[str, str]] = {"ours": {}, "naive": {}} | ({} if options.quick else {"naive_tuned": _TUNED})
    found: dict[str, dict[int, list[Quantiles]]] = {name: {LOW: [], HIGH: []} for name in variants}
    for number in options.repeat():
        for name, more in variants.items():
            for rate in (LOW, HIGH):
                if rate == HIGH and name != "ours":
                    continue  # it falls behind, and all that is measured then is the backlog
                with stage.scene() as scene:
                    _start(scene, name, more)
                    found[name][rate].append(_measured(scene, rate, seconds, name))
        options.say(f"round {number + 1}: {found['ours'][LOW][-1]} {found['ours'][HIGH][-1]}")
    low, high = _middle(found["ours"][LOW]), _middle(found["ours"][HIGH])
    return Report(
        name="latency",
        unit="ms",
        reach=f"p50 <= 2.5 and p99 <= 6 at {LOW}/s, p99 <= 25 at {HIGH}/s",
        rounds={name: [one["p50"] for one in rates[LOW]] for name, rates in found.items()},
        reached=low["p50"] <= 2.5 and low["p99"] <= 6 and high["p99"] <= 25,
        less_is_better=True,
        details={
            f"ours_at_{LOW}": low,
            f"ours_at_{HIGH}": high,
            "naive_at_20": _middle(found["naive"][LOW]),
            "naive_with_both_polls_at_50_ms": None if options.quick else _middle(found["naive_tuned"][LOW]),
            "seconds_each": seconds,
        },
    )


def _start(scene: Scene, name: str, more: dict[str, str]) -> None:
    probe = str(scene.directory / "probe")
    if name == "ours":
        scene.start_consumers("benchmarks.probe:ours", more={"BENCH_PROBE": probe})
        scene.start_relay()
    else:
        scene.connection.execute(naive.SCHEMA)
        scene.start_consumers("benchmarks.probe:naive", threads=8, more={"BENCH_PROBE": probe, **more})
        scene.start_naive_relay(**more)


def _measured(scene: Scene, rate: int, seconds: float, name: str) -> Quantiles:
    committed = write(scene, rate, seconds, "dovecote.outbox" if name == "ours" else "naive.outbox")
    probe = scene.directory / "probe"
    scene.until(
        lambda: probe.exists() and probe.read_bytes().count(b"\n") >= len(committed), 60, "all are handled", every=0.2
    )
    reached = _notes(probe)
    # The first second warms connections, plans and caches up.
    ends = min(committed.values()) + 1_000_000_000
    waits = [(reached[id] - at) / 1e6 for id, at in committed.items() if at > ends]
    return {
        "p50": round(percentile(waits, 0.5), 3),
        "p95": round(percentile(waits, 0.95), 3),
        "p99": round(percentile(waits, 0.99), 3),
        "max": round(max(waits), 3),
        "events": len(waits),
    }


def write(scene: Scene, rate: int, seconds: float, table: str) -> dict[UUID, int]:
    """Write at random times, `rate` a second on average; return each event's commit in Unix nanoseconds."""
    committed: dict[UUID, int] = {}
    threads = [
        threading.Thread(target=_writer, args=(scene.database_url, rate / _WRITERS, seconds, table, committed, n))
        for n in range(_WRITERS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return committed


def _writer(url: str, rate: float, seconds: float, table: str, committed: dict[UUID, int], number: int) -> None:
    arrivals = random.Random(number)
    event = _EVENT.format(table=table)
    with psycopg.connect(url, prepare_threshold=1) as connection:
        start = due = time.monotonic()
        while due < start + seconds:
            due += arrivals.expovariate(rate)
            # The offered rate itself: nothing is awaited.
            time.sleep(max(0.0, due - time.monotonic()))
            id, symbol = uuid7(), f"s{number}-{arrivals.randrange(250)}"
            timestamp = "2026-01-01T00:00:00+00:00"
            payload = _PAYLOAD.format(timestamp, symbol, "x" * 145)
            headers = _HEADERS.format(arrivals.getrandbits(128), arrivals.getrandbits(64))
            with connection.transaction():
                connection.execute(_DOMAIN_ROW, (symbol,))
                connection.execute(event, (id, symbol, payload, headers))
            committed[id] = time.time_ns()


def _notes(probe: Path) -> dict[UUID, int]:
    lines = (line.split() for line in probe.read_text().splitlines())
    return {UUID(id): int(reached) for id, reached in lines}


def _middle(rounds: list[Quantiles]) -> Quantiles:
    """Return the round whose p99 is the median one."""
    return sorted(rounds, key=lambda one: one["p99"])[(len(rounds) - 1) // 2]
