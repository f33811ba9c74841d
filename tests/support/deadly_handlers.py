"""Worker processes that die: handlers that kill or hang, and a nursery that starts a new process for each dead one.

`python -m tests.support.deadly_handlers` imports everything once and forks; so a test can watch a dozen deaths in
seconds.
"""

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import dramatiq
from sqlalchemy import text

from domain.pricing import PriceQuoted
from dovecote import bootstrap
from dovecote.consumer import time_limits
from dovecote.route import Dovecote, Route
from dovecote.unit_of_work import UnitOfWork
from tests.support.effects import note_as

DEADLY = 13
HANGING = 14


def _die(how: str) -> None:
    if how == "exit":
        os._exit(9)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(how: str) -> None:
    if how == "in C":
        # No exception can be raised in here: the process has to end.
        silent, _other = socket.socketpair()
        silent.recv(1)
    while True:
        time.sleep(0.01)


def _note(handler: str, how: str, event: PriceQuoted, uow: UnitOfWork) -> None:
    price = int(event.price)
    if event.symbol == handler and price in (DEADLY, HANGING):
        if how == "retry" and not _has_failed(event, uow):
            raise RuntimeError("before it is a retry, it only fails")
        note_start(handler)
        if price == DEADLY:
            _die(how)
        _hang(how)
    note_as(handler, event, uow)


def _has_failed(event: PriceQuoted, uow: UnitOfWork) -> bool:
    query = text("select exists (select from dovecote.deliveries where event_id = :id)")
    return bool(uow.session.scalar(query, {"id": event.event_id}))


def _single(handler: str, how: str, **more: Any) -> Route:
    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        _note(handler, how, event, uow)

    return _route(handler, act, **more)


def _bulk(handler: str, how: str, **more: Any) -> Route:
    def act(envelopes: Sequence[Any], uow: UnitOfWork, _gateways: object) -> None:
        for envelope in envelopes:
            _note(handler, how, envelope.event, uow)

    return _route(handler, act, bulk=True, **more)


def _route(handler: str, act: Any, **more: Any) -> Route:
    options = {"queue": "deadly", "backoff_seconds": 0.05, "time_limit_seconds": 1.0, **more}
    return Route(handler=handler, events=(PriceQuoted,), function=act, **options)


ROUTES = (
    _single("exits", "exit"),
    _bulk("segfaults", "segfault"),
    _single("in.order", "kill", ordered=True),
    _single("retried", "retry"),
    _single("in.c", "in C", max_attempts=2),
    _bulk("in.c.in.bulk", "in C", max_attempts=1),
)


def note_start(handler: str) -> None:
    """Remember beyond death that the deadly event was started."""
    with Path(os.environ["DEADLY_STARTS"]).open("a") as file:
        file.write(f"{handler}\n")


def starts_of(handler: str) -> list[str]:
    try:
        return [line for line in Path(os.environ["DEADLY_STARTS"]).read_text().split() if line == handler]
    except FileNotFoundError:
        return []


def _work(threads: int) -> NoReturn:
    wanted = os.environ["DEADLY_HANDLERS"].split()
    time_limits.GRACE_SECONDS = 1.0
    bootstrap.start_consumers(Dovecote(routes=[route for route in ROUTES if route.handler in wanted]))
    worker = dramatiq.Worker(dramatiq.get_broker(), worker_threads=threads, worker_timeout=100)
    worker.start()

    def stop(*_: object) -> None:
        worker.stop(timeout=5_000)
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    while True:
        signal.pause()


def _nurse(threads: int) -> NoReturn:
    while True:
        child = os.fork()
        if child == 0:
            _work(threads)

        def stop(*_: object, child: int = child) -> None:
            os.kill(child, signal.SIGTERM)
            os.waitpid(child, 0)
            os._exit(0)

        signal.signal(signal.SIGTERM, stop)
        os.waitpid(child, 0)


if __name__ == "__main__":
    _nurse(int(sys.argv[1]))
