"""Dramatiq without an outbox: `actor.send()` after the commit, one message and one transaction an event.

    dramatiq benchmarks.peers.raw_dramatiq:broker               the consumers
    python -m benchmarks.peers.raw_dramatiq backlog EVENTS      sends as fast as it can
    python -m benchmarks.peers.raw_dramatiq steady SECONDS RATE sends at random times, each after a commit

What is lost when the process dies between commit and send stays lost, and what is delivered twice is done twice.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import dramatiq
import psycopg

from benchmarks.naive import APPLY, broker, connection_of_thread
from benchmarks.offered import DOMAIN_ROW
from benchmarks.probe import note
from dovecote.events.ids import uuid7

__all__ = ["apply_raw", "broker"]


@dramatiq.actor(queue_name="raw")
def apply_raw(event_id: str, data: dict[str, Any]) -> None:
    """Act on one event."""
    reached = time.time_ns()
    connection_of_thread().execute(APPLY, data)
    note(event_id, reached)


def send(id: UUID) -> None:
    timestamp = "2026-01-01T00:00:00+00:00"
    data = {
        "symbol": f"s{id.int % 1000}",
        "price": "1.25",
        "as_of": timestamp,
        "occurred_at": timestamp,
        "remark": "x" * 145,
    }
    apply_raw.send(str(id), data)


def backlog(events: int) -> Iterator[tuple[UUID, int]]:
    """Send so many messages; yield the time before the first one."""
    yield uuid7(), time.time_ns()
    for _ in range(events):
        send(uuid7())


def steady(seconds: float, rate: float) -> Iterator[tuple[UUID, int]]:
    """Send after each commit of a domain row; yield the time of each commit."""
    arrivals = random.Random(0)
    with psycopg.connect(os.environ["DATABASE_URL"], prepare_threshold=1) as connection:
        started = due = time.monotonic()
        while (due := due + arrivals.expovariate(rate)) < started + seconds:
            time.sleep(max(0.0, due - time.monotonic()))
            id = uuid7()
            with connection.transaction():
                connection.execute(DOMAIN_ROW, ("raw",))
            yield id, time.time_ns()
            send(id)


def main(what: str, *numbers: str) -> None:
    sent = backlog(int(numbers[0])) if what == "backlog" else steady(*map(float, numbers))
    lines = [f"{id} {at}\n" for id, at in sent]
    # Renamed into place: a reader that waits for the file never sees half of it.
    unfinished = Path(os.environ["BENCH_SENT"] + ".unfinished")
    unfinished.write_text("".join(lines))
    unfinished.rename(os.environ["BENCH_SENT"])


if __name__ == "__main__":
    main(*sys.argv[1:])
