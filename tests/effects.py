"""A handler whose effects can be counted: each is a row, and nothing stops it from writing one twice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, text

from domain.pricing import PriceQuoted
from domain.unit_of_work import UnitOfWork, unit_of_work
from tests.quotes import a_quote
from tests.system import System
from workers.gateways import Gateways
from workers.routes import Route


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


def a_route(handler: str = "test.note", act: Any = None, **more: Any) -> Route:
    """A route for quotes; without `act` its handler notes every one of them."""

    def note(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        note_as(handler, event, uow)

    quick: Mapping[str, Any] = {"queue": "test", "backoff_seconds": 0.02, "longest_backoff_seconds": 0.1}
    return Route(handler=handler, events=(PriceQuoted,), act=act or note, **{**quick, **more})


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
