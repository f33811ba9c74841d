"""A handler whose effects can be counted: each is a row, and nothing stops it from writing one twice."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import sqlalchemy.exc
from sqlalchemy import Engine, text

from domain.pricing import PriceQuoted
from dovecote.route import Route
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.quotes import a_quote
from tests.support.system import System
from workers.gateways import Gateways


@dataclass(frozen=True)
class Effect:
    handler: str
    symbol: str
    price: int


def note_as(handler: str, event: PriceQuoted, uow: UnitOfWork) -> None:
    uow.session.execute(
        text("insert into effects (handler, event_id, symbol, price) values (:handler, :event_id, :symbol, :price)"),
        {"handler": handler, "event_id": event.event_id, "symbol": event.symbol, "price": int(event.price)},
    )


def a_route(handler: str = "test.note", function: Any = None, **more: Any) -> Route:
    """A route for quotes; without `function` its handler notes every one of them."""

    def note(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        note_as(handler, event, uow)

    quick: Mapping[str, Any] = {"queue": "test", "backoff_seconds": 0.02, "max_backoff_seconds": 0.1}
    return Route(handler=handler, events=(PriceQuoted,), function=function or note, **{**quick, **more})


def make_room_for_effects(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "create table effects (n bigserial primary key, handler text, event_id uuid, symbol text, price int,"
                " at timestamptz not null default clock_timestamp())"
            )
        )


def effects_in(engine: Engine) -> list[Effect]:
    with engine.connect() as connection:
        found = connection.execute(text("select handler, symbol, price from effects order by n"))
        return [Effect(*row) for row in found]


def write_quotes(system: System, prices: Sequence[int], symbol: str = "EUR") -> None:
    with unit_of_work(system.sessions) as uow:
        for price in prices:
            uow.emit(a_quote(symbol, price))


class Writers:
    """Threads that write quotes until the end of the block, and know how many they committed."""

    def __init__(self, system: System, threads: int = 3, pause_seconds: float = 0.002) -> None:
        self.written = 0
        self._pause_seconds = pause_seconds
        self._system, self._stop, self._lock = system, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(threads)]

    def __enter__(self) -> "Writers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def have_written(self, events: int) -> bool:
        return self.written >= events

    def _write(self, number: int) -> None:
        price = 0
        while not self._stop.wait(self._pause_seconds):
            prices = list(range(price, price + 20))
            with suppress(sqlalchemy.exc.DBAPIError):
                write_quotes(self._system, prices, f"S{number}")
                with self._lock:
                    self.written += 20
            price += 20


def each_once(effects: Sequence[Effect]) -> bool:
    return len(effects) == len(set(effects))
