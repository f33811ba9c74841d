"""The built-in application, for a look at a running system before there is one: `dovecote up` without DOVECOTE_APP."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from dovecote.events import Event
from dovecote.route import Command, Dovecote, Route

if TYPE_CHECKING:  # SQLAlchemy and the driver come with these, and the list of commands needs neither
    from dovecote.local.demonstration import UseCase
    from dovecote.unit_of_work import UnitOfWork

_AGGREGATES = 10


@dataclass(frozen=True, kw_only=True)
class PigeonSent(Event, type="dovecote.pigeon_sent.v1", aggregate="pigeon", key="pigeon"):
    pigeon: str
    flight: int


def receive(_event: PigeonSent, _uow: "UnitOfWork", _gateways: Any) -> None:
    """Do nothing: the row in dovecote.processed_events, which the library writes, is all there is to see."""


def use_cases(run_id: UUID) -> "Iterator[UseCase]":
    """Yield use cases of exactly one event each."""
    flight = 0
    while True:
        flight += 1
        yield _send(f"{run_id}-{flight % _AGGREGATES}", flight)


def _send(pigeon: str, flight: int) -> "UseCase":
    def send(uow: "UnitOfWork", at: datetime) -> None:
        uow.emit(PigeonSent(pigeon=pigeon, flight=flight, occurred_at=at))

    return send


app = Dovecote(
    routes=(
        Route(
            handler="demo.receive",
            events=(PigeonSent,),
            function=receive,
            queue="demo",
            ordered=True,
            replayable=True,
            replay_note="it does nothing",
        ),
    ),
    commands={"demo": Command("dovecote.cli.demo:demo", "Write events and wait until each is processed, once.")},
    procfile=Path(__file__).parent / "Procfile",
)
