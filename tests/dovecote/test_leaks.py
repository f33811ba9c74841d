"""Tries to get secrets and phone numbers out through logs and traces, every way a careless handler might."""

import base64
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dovecote import masking
from dovecote.masking import never_show
from dovecote.settings import Telemetry, load_settings, secrets
from dovecote.telemetry import export
from dovecote.telemetry.configure import configure
from dovecote.telemetry.logs import log_uncaught

PASSWORD = "correct-horse-battery"  # known to the process
NAMED = "hunter2 and more"  # known by its name only
NUMBER = "4915112345678"
KEY_TEXT = "yBN9EAP/kKycWPliwcZ4mSZawdxtp/5a0o1JXbB+cRY="
KEY = base64.b64decode(KEY_TEXT)
URL_SAFE_KEY = base64.urlsafe_b64encode(KEY).decode()

log = structlog.get_logger()
library = logging.getLogger("somebody.else")


@dataclass
class Account:
    """Shows all it has."""

    phone: str = f"+{NUMBER}"
    password: str = PASSWORD


class Loud:
    def __repr__(self) -> str:
        return f"<Loud {PASSWORD} +{NUMBER}>"


def fail() -> None:
    try:
        try:
            raise ConnectionError(f"redis://:{PASSWORD}@cache:6379 is away")
        except ConnectionError as error:
            raise LookupError(f"nobody at +49 151 1234 5678, api_key='{NAMED}'") from error
    except LookupError as error:
        failure = ValueError(f"Failing row contains (1, {NUMBER}, {PASSWORD}).")
        failure.add_note(f"the caller was +{NUMBER}, password={PASSWORD}")
        raise ExceptionGroup("both", [failure, RuntimeError(f"Bearer {KEY_TEXT}")]) from error


def structlog_exception() -> None:
    try:
        fail()
    except ExceptionGroup:
        log.exception("failed")


def library_exception() -> None:
    try:
        fail()
    except ExceptionGroup:
        library.exception("failed for %s", f"+{NUMBER}")


def in_a_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


ATTEMPTS: dict[str, Callable[[], object]] = {
    "the message": lambda: log.info(f"calling +{NUMBER} with {PASSWORD}"),
    "positional arguments": lambda: log.warning("calling %s with %s", f"+{NUMBER}", PASSWORD),
    "a number in groups": lambda: log.info("calling +49 (151) 1234-5678"),
    "values": lambda: log.info("x", to=f"+{NUMBER}", url=f"postgresql://u:{PASSWORD}@db/x", query=quote(f"+{NUMBER}")),
    "names": lambda: log.info("x", phone=NUMBER, mobile=int(NUMBER), password=NAMED, api_key=NAMED, sms_token=NAMED),
    "bytes": lambda: log.info("x", body=f"+{NUMBER} {PASSWORD}".encode(), password=NAMED.encode()),
    "nested": lambda: log.info(
        "x", a={"b": [{"password": NAMED}, (f"+{NUMBER}", {PASSWORD})], "phone": {"no": "+" + NUMBER}}
    ),
    "nested names": lambda: log.info("x", headers=MappingProxyType({"Authorization": NAMED, "phone": int(NUMBER)})),
    "names as keys": lambda: log.info("x", seen={f"+{NUMBER}": 1, PASSWORD: 2}),
    "JSON in JSON": lambda: log.info("x", body=json.dumps({"body": json.dumps({"password": NAMED, "phone": NUMBER})})),
    "objects": lambda: log.info("x", account=Account(), loud=[Loud()], error=ValueError(f"{PASSWORD} +{NUMBER}")),
    "keys": lambda: log.info(
        "x", raw=KEY, hex=KEY.hex(), text=KEY_TEXT, url=base64.urlsafe_b64encode(KEY), held=repr(KEY)
    ),
    "bound": lambda: log.bind(password=NAMED, caller=f"+{NUMBER}").info("x"),
    "an exception": structlog_exception,
    "an exception in a library": library_exception,
    "a thread's end": in_a_thread,
    "a library's arguments": lambda: library.warning(
        "%s at %r for %s", f"redis://:{PASSWORD}@c", Account(), f"+{NUMBER}"
    ),
    "a library's named arguments": lambda: library.error("%(a)s %(b)r", {"a": PASSWORD, "b": [f"+{NUMBER}"]}),
    "a library's wrong arguments": lambda: library.error("%d %s", f"+{NUMBER}"),
    "a library's extra": lambda: library.error("x", extra={"password": NAMED, "caller": f"+{NUMBER}"}),
    "a library's own words": lambda: library.error("password='%s' phone: %s", NAMED, NUMBER),
}


def leaks(said: str) -> list[str]:
    plain = said.replace("\\\\", "\\")
    hidden = [
        PASSWORD,
        "hunter2",
        "and more",
        KEY_TEXT,
        KEY.hex(),
        base64.urlsafe_b64encode(KEY).decode(),
        repr(KEY)[2:-1],
    ]
    digits = "".join(letter for letter in plain if letter.isdigit())
    return [one for one in hidden if one in plain] + [one for one in (NUMBER, NUMBER[2:-2], "1512345") if one in digits]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(masking, "_known", set())
    variables = {
        "DOVECOTE_APP": "workers.app:app",
        "DOVECOTE_HOME": str(tmp_path),
        "DATABASE_URL": f"postgresql://u:{PASSWORD}@db/x",
        "REDIS_URL": f"redis://:{quote(PASSWORD)}@cache:6379/0",
        "DOVECOTE_PRIVACY__ENCRYPTION_KEYS": f"k1:{KEY_TEXT}",
    }
    never_show(secrets(load_settings(variables, directory=tmp_path)))


@pytest.fixture(params=["console", "json"])
def log_format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    before = logging.getLogger().handlers[:]
    # Put back after the test.
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield request.param
    logging.getLogger().handlers[:] = before
    structlog.reset_defaults()


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_nothing_leaks_into_a_log_through(attempt: str, log_format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configure(Telemetry(log_format=log_format), "test")
    log_uncaught()

    ATTEMPTS[attempt]()

    said = capsys.readouterr().err
    assert said.strip()
    assert leaks(said) == []
    if log_format == "json":
        assert all(json.loads(line)["event"] for line in said.splitlines())


def test_nothing_leaks_into_a_trace() -> None:
    exporter = InMemorySpanExporter()
    provider = export.provider_for(1.0, "test")
    provider.add_span_processor(SimpleSpanProcessor(export.Masking(exporter)))
    tracer = provider.get_tracer("a handler")

    attributes: dict[str, Any] = {
        "url": f"redis://:{PASSWORD}@cache",
        "phone": int(NUMBER),
        "password": NAMED,
        "to": [f"+{NUMBER}", PASSWORD],
        "raw": KEY,
    }

    def call() -> None:
        with tracer.start_as_current_span(f"call +{NUMBER}", attributes=attributes) as span:
            span.add_event(f"dialled +{NUMBER}", attributes)
            span.add_link(span.get_span_context(), attributes)
            fail()

    with pytest.raises(ExceptionGroup):
        call()

    (exported,) = exporter.get_finished_spans()
    assert "ExceptionGroup" in exported.to_json()
    assert leaks(json.dumps(json.loads(exported.to_json()), ensure_ascii=False)) == []
