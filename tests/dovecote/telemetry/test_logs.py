"""Every line says which component wrote it, and what was in flight when it did."""

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import structlog

from domain.pricing import PriceQuoted
from dovecote.envelope import Envelope, read_envelope
from dovecote.route import Route
from dovecote.settings import Settings, Telemetry
from dovecote.store.bundle import Bundle
from dovecote.telemetry.configure import configure
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.effects import a_route
from tests.support.quotes import a_quote
from tests.support.system import System, system_for

log = structlog.get_logger()
library = logging.getLogger("somebody.else")


class Lines:
    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def configure(self, **options: Any) -> None:
        configure(Telemetry(**{"log_format": "json", **options}), "test")

    def read(self, *events: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._capture.readouterr().err.splitlines()]
        return [line for line in lines if line["event"] in events or not events]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    before = logging.getLogger().handlers[:]
    yield Lines(capsys)
    logging.getLogger().handlers[:] = before
    logging.getLogger().setLevel(logging.WARNING)
    structlog.reset_defaults()


def carry(settings: Settings, route: Route, *events: PriceQuoted, **headers: str) -> None:
    with system_for(settings, (route,)) as system:
        with unit_of_work(system.sessions, headers=headers) as uow:
            for event in events:
                uow.emit(event)
        with system.running():
            system.until_quiet()


def write(system: System, *events: PriceQuoted) -> list[Envelope]:
    with unit_of_work(system.sessions) as uow:
        for event in events:
            uow.emit(event)
    with system.engine.connect() as connection:
        found = connection.exec_driver_sql("select dovecote.envelope(o)::json from dovecote.outbox o order by position")
        return [read_envelope(fields) for fields in found.scalars()]


def test_lines_logged_by_a_handler_name_its_event(settings: Settings, lines: Lines) -> None:
    def act(event: PriceQuoted, uow: UnitOfWork, _: object) -> None:
        log.info("acting", price=str(event.price))
        library.info("acting for %s", event.symbol)

    lines.configure()
    first, second = a_quote("EUR", 1), a_quote("USD", 2)
    headers = {"correlation_id": "request-17", "traceparent": f"00-{'a' * 32}-{'b' * 16}-00"}

    carry(settings, a_route(function=act), first, second, **headers)

    said = lines.read("acting", "acting for EUR", "acting for USD")
    assert [line.get("price") for line in said] == ["1", None, "2", None]
    for line, quote in zip(said, (first, first, second, second), strict=True):
        for name, expected in {
            "component": "test",
            "handler": "test.note",
            "event_id": str(quote.event_id),
            "aggregate": f"price {quote.symbol}",
            "correlation_id": "request-17",
            "trace_id": "a" * 32,
            "span_id": "b" * 16,
        }.items():
            assert line[name] == expected


def test_lines_logged_by_a_bulk_handler_name_its_bundle_or_its_only_event(settings: Settings, lines: Lines) -> None:
    def act(envelopes: Sequence[Envelope], *_: object) -> None:
        log.info("acting")
        if len(envelopes) > 1:
            raise ValueError("one by one, please")

    lines.configure()
    quotes = [a_quote("EUR", 1), a_quote("USD", 2)]

    carry(settings, a_route(function=act, bulk=True), *quotes)

    together, *alone = lines.read("acting")
    assert (together["handler"], together["events"]) == ("test.note", 2)
    assert "event_id" not in together
    assert [line["event_id"] for line in alone] == [str(quote.event_id) for quote in quotes]
    assert not any("events" in line for line in alone)


def test_a_bundle_of_which_one_event_is_new_names_that_one(settings: Settings, lines: Lines) -> None:
    route = a_route(function=lambda *_: log.info("acting"), bulk=True)
    lines.configure()
    with system_for(settings, (route,)) as system:
        bundle = write(system, a_quote("EUR", 1), a_quote("USD", 2))
        system.consumer.consume(Bundle(route, bundle[:1]))

        system.consumer.consume(Bundle(route, bundle))

    assert [line["aggregate"] for line in lines.read("acting")] == ["price EUR", "price USD"]


def test_what_is_logged_after_an_event_does_not_name_it(settings: Settings, lines: Lines) -> None:
    route = a_route(function=lambda *_: log.info("acting"))
    lines.configure()
    with system_for(settings, (route,)) as system:
        system.consumer.consume(Bundle(route, write(system, a_quote("EUR", 1))))

    log.info("idle")

    (idle,) = lines.read("idle")
    assert idle.keys() == {"event", "component", "level", "timestamp"}


def test_a_line_of_any_thread_names_the_component(lines: Lines) -> None:
    lines.configure()

    threads = [threading.Thread(target=log.info, args=("by structlog",)), threading.Thread(target=warn_as_library)]
    for thread in threads:
        thread.start()
        thread.join()

    assert [line["component"] for line in lines.read("by structlog", "by a library")] == ["test", "test"]


def test_a_line_for_people_names_the_component(lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    lines.configure(log_format="console")

    log.info("here")

    assert "component=test" in capsys.readouterr().err


def test_what_the_caller_says_is_not_replaced(lines: Lines) -> None:
    lines.configure()

    log.info("here", component="mine")

    assert [line["component"] for line in lines.read("here")] == ["mine"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_holds_for_structlog_and_for_the_standard_library(lines: Lines, level: str, shown: int) -> None:
    lines.configure(log_level=level)

    for logger in (log, library):
        for method in ("debug", "info", "warning", "error"):
            getattr(logger, method)(method)

    assert [line["event"] for line in lines.read()] == ["debug", "info", "warning", "error"][-shown:] * 2


def test_a_collector_that_is_away_is_reported_once_a_minute(lines: Lines) -> None:
    lines.configure()
    exporter = logging.getLogger("opentelemetry.exporter.otlp")

    for tries in range(100):
        exporter.warning("Transient error encountered, retrying in %ss", tries)
        library.warning("again")

    assert len(lines.read("again", "Transient error encountered, retrying in 0s")) == 101


def warn_as_library() -> None:
    library.warning("by a library")
