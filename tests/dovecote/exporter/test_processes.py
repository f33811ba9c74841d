"""Traces and logs of real processes: a relay and Dramatiq's workers, beside a collector that is one, too."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from sqlalchemy import Engine, text

from dovecote import operations
from dovecote.settings import Settings
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
from tests.support.exact_counts import count_everything
from tests.support.processes import eventually
from tests.support.quotes import a_quote
from workers.routes import ROUTES

RELAY = ["-m", "dovecote", "relay"]
CONSUMERS = [
    *["-m", "dramatiq", "dovecote.bootstrap:consumers", "--queues", "pricing"],
    *["--processes", "1", "--threads", "2", "--skip-logging"],
]


@pytest.fixture
def collector(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a collector, and the file it writes spans to."""
    file = tmp_path / "spans"
    file.touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.otlp_receiver", str(file)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}", file
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url)
    yield engine
    engine.dispose()


class Process:
    """One process of the system; what it says is kept in a file."""

    def __init__(self, arguments: list[str], settings: Settings, log: Path, **variables: str) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], env=_environment(settings) | variables, stderr=file, stdout=file
            )

    def end(self, within_seconds: float = 20) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_seconds)

    def said(self) -> str:
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.said().splitlines()]


@contextmanager
def running(arguments: list[str], settings: Settings, log: Path, **variables: str) -> Iterator[Process]:
    one = Process(arguments, settings, log, **variables)
    try:
        yield one
    finally:
        if one.process.poll() is None:
            one.end()


def _environment(settings: Settings) -> dict[str, str]:
    def secret(section: str, name: str) -> str:
        return str(getattr(getattr(settings, section), name).get_secret_value())

    return {
        **os.environ,
        "DATABASE_URL": secret("database", "url"),
        "REDIS_URL": secret("redis", "url"),
        "DOVECOTE_REDIS__NAMESPACE": settings.redis.namespace,
        **{
            f"DOVECOTE_PRIVACY__{name.upper()}": secret("privacy", name) for name in type(settings.privacy).model_fields
        },
    }


def write(engine: Engine, trace_id: str, span_id: str) -> None:
    """Commit a quote and an event that no handler can read, both from one sampled span."""
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01", "correlation_id": "request-17"}
    with unit_of_work(sessions_for(engine), headers=headers) as uow:
        uow.emit(a_quote("EUR", 1))
        query = "select dovecote.append_event('price', 'USD', 'pricing.price_quoted.v1', '{}', :headers)"
        uow.session.execute(text(query), {"headers": json.dumps(headers)})


def until_quiet(engine: Engine) -> None:
    eventually(lambda: operations.status.get_status(engine, ROUTES).relay.leading, 30, "a relay that leads")
    eventually(lambda: count_everything(engine, ROUTES).is_quiet, 30, "a quiet system")


def spans_in(file: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines():
        span = json.loads(line)
        found.setdefault(span["name"], []).append(span)
    return found


def test_a_collector_gets_one_trace_down_to_the_last_span_before_the_end(
    settings: Settings, engine: Engine, collector: tuple[str, Path], tmp_path: Path
) -> None:
    url, file = collector
    trace_id, span_id = "5" * 32, "7" * 16
    variables = {
        "DOVECOTE_TELEMETRY__OTLP_ENDPOINT": url,
        # Nothing is sent before the end but by the end.
        "OTEL_BSP_SCHEDULE_DELAY": "600000",
    }
    write(engine, trace_id, span_id)
    with (
        running(RELAY, settings, tmp_path / "relay.log", **variables) as relay,
        running(CONSUMERS, settings, tmp_path / "consumers.log", OTEL_SERVICE_NAME="prices", **variables) as consumers,
    ):
        until_quiet(engine)
        assert file.read_text() == ""

        assert (relay.end(), consumers.end()) == (0, 0)

    spans = spans_in(file)
    sent, processed = spans["send pricing"], spans["process pricing"]
    for span in (*sent, *processed):
        assert (span["path"], span["trace_id"], span["parent_id"]) == ("/v1/traces", trace_id, span_id)
        assert span["attributes"]["messaging.message.conversation_id"] == "request-17"
    assert len({span["attributes"]["messaging.message.id"] for span in sent}) == len(sent) == 2
    assert {span["attributes"].get("error.type") for span in processed} >= {None, "InvalidEvent"}
    assert [span["resource"]["service.name"] for span in (sent[0], processed[0])] == ["dovecote", "prices"]
    resources = [span["resource"] for span in (sent[0], processed[0])]
    assert [resource["dovecote.component"] for resource in resources] == ["relay", "consumers"]
    assert resources[0]["service.instance.id"] != resources[1]["service.instance.id"]
    assert all(resource["service.version"] for resource in resources)


def test_what_processes_log_is_json_that_names_component_event_and_trace(
    settings: Settings, engine: Engine, tmp_path: Path
) -> None:
    trace_id, span_id = "5" * 32, "7" * 16
    write(engine, trace_id, span_id)
    with (
        running(RELAY, settings, tmp_path / "relay.log") as relay,
        running(CONSUMERS, settings, tmp_path / "consumers.log") as consumers,
    ):
        until_quiet(engine)
    with engine.connect() as connection:
        (event_id,) = connection.exec_driver_sql("select event_id::text from dovecote.deliveries").scalars()

    assert {line["component"] for line in relay.lines()} == {"relay"}
    assert "relay leads" in [line["event"] for line in relay.lines()]
    (failed,) = [line for line in consumers.lines() if line["event"] == "event failed"]
    expected: Mapping[str, object] = {
        "level": "warning",
        "component": "consumers",
        "handler": "pricing.apply_quotes",
        "event_id": event_id,
        "aggregate": "price USD",
        "correlation_id": "request-17",
        "trace_id": trace_id,
        "span_id": span_id,
    }
    assert {name: failed[name] for name in expected} == expected


def test_dramatiq_s_workers_write_for_people_where_their_master_has_a_terminal(
    settings: Settings, engine: Engine
) -> None:
    write(engine, "5" * 32, "7" * 16)
    terminal, inside = os.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen, os.fdopen(inside, "wb", buffering=0) as stderr:
        relay = subprocess.Popen([sys.executable, *RELAY], env=_environment(settings), stderr=subprocess.DEVNULL)
        consumers = subprocess.Popen([sys.executable, *CONSUMERS], env=_environment(settings), stderr=stderr)
        try:
            until_quiet(engine)
            said = _read_until(screen, b"InvalidEvent")
        finally:
            for process in (consumers, relay):
                process.terminate()
                process.wait(20)

    assert b"\x1b[" in said
    assert b"event failed" in said
    assert b'{"' not in said


def _read_until(screen: IO[bytes], words: bytes) -> bytes:
    said = b""
    while words not in said:
        said += screen.read(1_000)
    return said


def test_a_collector_that_never_answers_neither_floods_the_log_nor_holds_a_process_up(
    settings: Settings, engine: Engine, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        variables = {
            "DOVECOTE_TELEMETRY__OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "600000",
        }
        write(engine, "5" * 32, "7" * 16)
        with running(RELAY, settings, tmp_path / "relay.log", **variables) as relay:
            eventually(
                lambda: operations.status.get_status(engine, ROUTES).relay.published == 2, 30, "two published events"
            )

            # The exporter itself would wait ten seconds for an answer, and its processor thirty.
            assert relay.end(within_seconds=8) == 0

    assert [line["event"] for line in relay.lines()] == [
        "relay leads",
        "a new history begins",
        "relay stopped",
    ]
