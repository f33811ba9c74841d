"""An event that kills or blocks its process is found and dead-lettered; everything else goes through."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from dovecote.settings import Settings
from dovecote.unit_of_work import unit_of_work
from tests.support import deadly_handlers as deadly
from tests.support.deadly_handlers import DEADLY, HANGING
from tests.support.effects import make_room_for_effects
from tests.support.keys import KEYS
from tests.support.processes import eventually
from tests.support.quotes import a_quote
from tests.support.system import System, system_for

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "starts"
    monkeypatch.setenv("DEADLY_STARTS", str(path))
    return path


@contextmanager
def running(settings: Settings, handlers: Sequence[str], starts: Path, threads: int = 3) -> Iterator[System]:
    """A relay here, workers in processes of their own that are started again when they die."""
    routes = [route for route in deadly.ROUTES if route.handler in handlers]
    with system_for(settings, routes) as system:
        system.broker.heartbeat_timeout = 1_000
        make_room_for_effects(system.engine)
        done = threading.Event()

        def reap() -> None:
            # What the relay does every few seconds, more often: a test has many deaths.
            while not done.wait(0.1):
                system.publisher.reap()

        reaper = threading.Thread(target=reap)
        nurse = subprocess.Popen(
            [sys.executable, "-m", "tests.support.deadly_handlers", str(threads)],
            env={**os.environ, **environment(settings), "DEADLY_HANDLERS": " ".join(handlers)},
        )
        reaper.start()
        try:
            with system.relay():
                yield system
        finally:
            done.set()
            reaper.join()
            nurse.terminate()
            nurse.wait(30)


def environment(settings: Settings) -> dict[str, str]:
    return {
        "DATABASE_URL": settings.database.url.get_secret_value(),
        "REDIS_URL": settings.redis.url.get_secret_value(),
        "DOVECOTE_REDIS__NAMESPACE": settings.redis.namespace,
        **KEYS,
        "DOVECOTE_CONSUMERS__POLL_INTERVAL_MS": "100",
        "DOVECOTE_TELEMETRY__LOG_LEVEL": "error",
    }


def write(system: System, *quotes: tuple[str, int]) -> None:
    with unit_of_work(system.sessions) as uow:
        for symbol, price in quotes:
            uow.emit(a_quote(symbol, price))


def deliveries(system: System) -> list[tuple[Any, ...]]:
    with system.engine.connect() as connection:
        query = (
            "select handler_name, aggregate_id, state, error_type, attempts"
            " from dovecote.deliveries order by 1, position"
        )
        return [tuple(row) for row in connection.execute(text(query))]


def dead(system: System) -> list[str]:
    return [handler for handler, _, state, _, _ in deliveries(system) if state == "dead"]


def effects(system: System, handler: str) -> list[tuple[str, int]]:
    with system.engine.connect() as connection:
        query = text("select symbol, price from effects where handler = :handler order by n")
        return [(symbol, price) for symbol, price in connection.execute(query, {"handler": handler})]


def keys_left(system: System) -> list[str]:
    """Keys that remember crashes or marks."""
    client: Any = system.broker.client
    found = [key.decode() for key in client.scan_iter(f"{system.broker.namespace}:*")]
    return [key for key in found if key.endswith((".msgs", ".in_flight"))]


def test_an_event_that_kills_its_process_is_dead_after_three_starts_and_its_mates_go_through(
    settings: Settings, starts: Path
) -> None:
    mates = [("exits", 1), ("other", 2), ("exits", 3)]
    with running(settings, ["exits"], starts) as system:
        write(system, mates[0], mates[1], ("exits", DEADLY), mates[2])

        eventually(lambda: dead(system), 60, "a dead letter")
        eventually(lambda: effects(system, "exits") == mates, 20, "the effects of its mates")
        eventually(lambda: keys_left(system) == [], 20, "nothing left in Redis")

        assert deliveries(system) == [("exits", "exits", "dead", "KilledTheProcess", 1)]
        assert len(starts.read_text().split()) == 3
        with psycopg.connect(settings.database.url.get_secret_value()) as connection:
            (error,) = connection.execute("select error from dovecote.deliveries").fetchone() or ("",)
        assert "the process died each of the 3 times that this event was in flight" in error


def test_poison_is_found_in_bulk_in_order_and_among_retries_at_once(settings: Settings, starts: Path) -> None:
    handlers = ["segfaults", "in.order", "retried"]
    quotes = [(symbol, price) for price in (1, DEADLY, 2) for symbol in ("other", *handlers)]
    with running(settings, handlers, starts) as system:
        write(system, *quotes)

        eventually(lambda: sorted(dead(system)) == sorted(handlers), 90, "three dead letters")
        for handler in handlers:
            expected = [quote for quote in quotes if quote != (handler, DEADLY)]
            if handler == "in.order":
                expected.remove((handler, 2))  # waits behind the dead one
            eventually(lambda h=handler, e=expected: effects(system, h) == e, 20, f"the effects of {handler}")  # type: ignore[misc]

        states = {(handler, state): attempts for handler, _, state, _, attempts in deliveries(system)}
        assert states == {
            ("segfaults", "dead"): 1,
            ("in.order", "dead"): 1,
            ("in.order", "waiting"): 0,
            ("retried", "dead"): 2,
        }
        assert all(len(deadly.starts_of(handler)) <= 4 for handler in handlers)


def test_an_event_in_flight_beside_poison_is_not_dead_lettered(settings: Settings, starts: Path) -> None:
    """Slow events of other messages die with the process, time after time, and are innocent."""
    with running(settings, ["exits", "in.order"], starts, threads=4) as system:
        write(system, ("exits", DEADLY), *[(f"S{number}", 5) for number in range(20)])

        eventually(lambda: dead(system), 60, "a dead letter")
        eventually(lambda: len(effects(system, "in.order")) == 21, 20, "all effects of the other handler")

        assert dead(system) == ["exits"]


def test_a_handler_that_hangs_in_c_ends_its_process_and_its_mates_go_through(settings: Settings, starts: Path) -> None:
    handlers = ["in.c", "in.c.in.bulk"]
    quotes = [("in.c", 1), ("in.c", HANGING), ("in.c.in.bulk", HANGING), ("in.c", 2)]
    with running(settings, handlers, starts) as system:
        write(system, *quotes)

        eventually(lambda: sorted(dead(system)) == handlers, 90, "two dead letters")
        for handler in handlers:
            expected = [quote for quote in quotes if quote != (handler, HANGING)]
            eventually(lambda h=handler, e=expected: effects(system, h) == e, 20, f"the effects of {handler}")  # type: ignore[misc]

        assert deliveries(system) == [
            ("in.c", "in.c", "dead", "TimeLimitExceeded", 2),
            ("in.c.in.bulk", "in.c.in.bulk", "dead", "TimeLimitExceeded", 1),
        ]
        with psycopg.connect(settings.database.url.get_secret_value()) as connection:
            for (error,) in connection.execute("select error from dovecote.deliveries"):
                assert "silent.recv(1)" in error, "it says where it hung"
