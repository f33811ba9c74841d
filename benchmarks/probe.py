"""Consumers that note when a handler's first line was reached, for the latency benchmark.

    dramatiq benchmarks.probe:ours
    dramatiq benchmarks.probe:naive

The notes go to the file named in BENCH_PROBE, one line an event: id and Unix nanoseconds.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from workers import bootstrap
from workers.routes import ROUTES, Route


def ours() -> None:
    """Set up the consumers of production, with a watch before each bulk handler."""
    vars(bootstrap)["ROUTES"] = tuple(_watched(route) for route in ROUTES)
    bootstrap.consumers()


def naive() -> None:
    """Set up the naive consumers, with a watch before the handler."""
    from benchmarks.naive import apply_quote

    act = apply_quote.fn

    def watched(event_id: str, event: dict[str, Any]) -> None:
        _note([event_id], time.time_ns())
        act(event_id, event)

    apply_quote.fn = watched


def _watched(route: Route) -> Route:
    if not route.bulk:
        return route

    def act(envelopes: Any, uow: Any, gateways: Any) -> None:
        reached = time.time_ns()
        route.act(envelopes, uow, gateways)
        _note((envelope.event_id for envelope in envelopes), reached)

    return replace(route, act=act)


def _note(event_ids: Iterable[object], reached_ns: int) -> None:
    with open(os.environ["BENCH_PROBE"], "a") as file:  # noqa: PTH123 - on the measured path, and open() is the shorter way
        file.write("".join(f"{event_id} {reached_ns}\n" for event_id in event_ids))
