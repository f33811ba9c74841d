"""Consumers that note when a handler's first line was reached, for the latency benchmark.

    dramatiq benchmarks.probe:ours
    dramatiq benchmarks.probe:naive

The notes go to the file named in BENCH_PROBE, one line an event: id and Unix nanoseconds. At high rates
BENCH_PROBE_ONE_IN thins them out; `is_noted` says which events are in the sample.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from dovecote import bootstrap
from dovecote.route import Route
from workers.app import app


def ours() -> None:
    """Set up the consumers of production, with a watch before each bulk handler."""
    bootstrap.start_consumers(app.with_routes([_watched(route) for route in app.routes]))


def naive() -> None:
    """Set up the naive consumers, with a watch before the handler."""
    from benchmarks.naive import apply_quote

    act = apply_quote.fn

    def watched(event_id: str, event: dict[str, Any]) -> None:
        _note([event_id], time.time_ns())
        act(event_id, event)

    apply_quote.fn = watched


def is_noted(event_id: UUID, one_in: int) -> bool:
    """Return whether an event is in the sample; its last bits are random."""
    return event_id.int % one_in == 0


def notes(file: Path) -> dict[UUID, int]:
    """Return what was noted: for each event the Unix nanoseconds of the handler's first line."""
    lines = (line.split() for line in file.read_text().splitlines()) if file.exists() else ()
    return {UUID(id): int(reached) for id, reached in lines}


def _watched(route: Route) -> Route:
    if not route.bulk:
        return route

    one_in = int(os.environ.get("BENCH_PROBE_ONE_IN", "1"))

    def act(envelopes: Any, uow: Any, gateways: Any) -> None:
        reached = time.time_ns()
        route.function(envelopes, uow, gateways)
        _note((envelope.event_id for envelope in envelopes if is_noted(envelope.event_id, one_in)), reached)

    return replace(route, function=act)


def note(event_id: object, reached_ns: int) -> None:
    """Note one event, if there is a file to note it in."""
    if "BENCH_PROBE" in os.environ:
        _note([event_id], reached_ns)


def _note(event_ids: Iterable[object], reached_ns: int) -> None:
    with open(os.environ["BENCH_PROBE"], "a") as file:  # noqa: PTH123 - on the measured path, and open() is the shorter way
        file.write("".join(f"{event_id} {reached_ns}\n" for event_id in event_ids))
