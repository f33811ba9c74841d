"""Tracing never fails an emit, and never writes what nobody asked for."""

import json
import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
from opentelemetry import baggage, context, propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from dovecote.errors import InvalidEvent
from dovecote.outbox import MAX_HEADER_BYTES
from dovecote.unit_of_work import unit_of_work
from tests.support.quotes import a_quote

pytestmark = pytest.mark.servers

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Injecting(TextMapPropagator):
    """A service's own propagator, which may do anything."""

    def __init__(self, inject: Callable[[Any], None]) -> None:
        self._inject = inject

    def inject(self, carrier: Any, *_: Any, **__: Any) -> None:
        self._inject(carrier)

    def extract(self, carrier: Any, context: Any = None, *_: Any, **__: Any) -> Any:
        return context

    @property
    def fields(self) -> set[str]:
        return set()


@pytest.fixture(autouse=True)
def _fresh(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(import_module("dovecote.unit_of_work.trace_headers"), "_has_warned", False)
    with engine.begin() as connection:
        connection.execute(text("truncate dovecote.outbox"))
    before = propagate.get_global_textmap()
    yield
    propagate.set_global_textmap(before)


def injecting(headers: dict[str, Any]) -> None:
    propagate.set_global_textmap(Injecting(lambda carrier: carrier.update(headers)))


def kept(engine: Engine, sessions: sessionmaker[Session], own: dict[str, str] | None = None) -> Any:
    """The headers that the outbox keeps of an event emitted here and now."""
    with unit_of_work(sessions, own) as uow:
        uow.emit(a_quote())
    with engine.connect() as connection:
        return connection.scalar(text("select headers from dovecote.outbox"))


def test_baggage_stays_with_the_caller(engine: Engine, sessions: sessionmaker[Session]) -> None:
    propagate.set_global_textmap(CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()]))
    token = context.attach(baggage.set_baggage("user.phone", "+447911123456"))
    try:
        with TracerProvider().get_tracer("test").start_as_current_span("a request"):
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            assert set(carrier) == {"traceparent", "baggage"}

            headers = kept(engine, sessions, {"correlation_id": "request-17"})
    finally:
        context.detach(token)

    assert headers == {"correlation_id": "request-17", "traceparent": carrier["traceparent"]}


def test_the_largest_headers_that_tracing_may_carry_fail_no_order(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    propagate.set_global_textmap(CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()]))
    incoming = {
        "traceparent": TRACEPARENT,
        "tracestate": "vendor=" + "t" * 250,
        "baggage": ",".join(f"k{number:03}=" + "x" * 170 for number in range(46)),
    }
    own: dict[str, str] = {}
    while len(json.dumps(own)) < MAX_HEADER_BYTES - 20:
        own[f"{len(own):x}"] = ""
    token = context.attach(propagate.extract(incoming))
    try:
        headers = kept(engine, sessions, own)
    finally:
        context.detach(token)

    assert headers == {**own, "traceparent": TRACEPARENT, "tracestate": incoming["tracestate"]}


def test_the_longest_trace_state_fits_beside_the_longest_headers(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    injecting({"traceparent": TRACEPARENT, "tracestate": '"' * 512})  # each is two bytes of JSON
    own: dict[str, str] = {}
    while len(json.dumps(own)) < MAX_HEADER_BYTES - 20:
        own[f"{len(own):x}"] = ""

    assert kept(engine, sessions, own)["tracestate"] == '"' * 512


@pytest.mark.parametrize(
    ("injected", "expected"),
    [
        ({"traceparent": TRACEPARENT, "b3": "1", "x-datadog-trace-id": "2"}, {"traceparent": TRACEPARENT}),
        ({"traceparent": TRACEPARENT, "tracestate": "a=1"}, {"traceparent": TRACEPARENT, "tracestate": "a=1"}),
        ({"traceparent": TRACEPARENT, "tracestate": "x" * 513}, {"traceparent": TRACEPARENT}),
        ({"traceparent": TRACEPARENT, "tracestate": "a=ö"}, {"traceparent": TRACEPARENT}),
        ({"traceparent": TRACEPARENT, "tracestate": "a=1\n"}, {"traceparent": TRACEPARENT}),
        ({"traceparent": TRACEPARENT, "tracestate": "a=\x00"}, {"traceparent": TRACEPARENT}),
        ({"traceparent": TRACEPARENT, "tracestate": ""}, {"traceparent": TRACEPARENT}),
        ({"traceparent": TRACEPARENT, "tracestate": b"a=1"}, {"traceparent": TRACEPARENT}),
        ({"tracestate": "a=1"}, {}),
        ({"traceparent": TRACEPARENT + "\n"}, {}),
        ({"traceparent": TRACEPARENT + "-more"}, {}),
        ({"traceparent": TRACEPARENT.upper()}, {}),
        ({"traceparent": "01" + TRACEPARENT[2:]}, {}),
        ({"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"}, {}),
        ({"traceparent": f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01"}, {}),
        ({"traceparent": "phone=+447911123456"}, {}),
        ({"traceparent": object()}, {}),
        ({"traceparent": None}, {}),
        ({3: set()}, {}),
    ],
)
def test_only_a_trace_that_is_one_is_kept(
    engine: Engine, sessions: sessionmaker[Session], injected: dict[str, Any], expected: dict[str, str]
) -> None:
    injecting(injected)

    assert kept(engine, sessions) == expected


def test_a_propagator_that_fails_is_reported_once(
    engine: Engine, sessions: sessionmaker[Session], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_carrier: Any) -> None:
        raise ZeroDivisionError

    def half(carrier: Any) -> None:
        carrier["traceparent"] = TRACEPARENT

    propagate.set_global_textmap(CompositePropagator([Injecting(half), Injecting(fail)]))

    with caplog.at_level(logging.WARNING, "dovecote"):
        headers = kept(engine, sessions)
        with unit_of_work(sessions) as uow:
            uow.emit(a_quote())

    assert headers == {"traceparent": TRACEPARENT}
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dovecote", "WARNING")
    assert "ZeroDivisionError" in (caplog.text)


def test_headers_of_the_services_own_win_and_are_limited_by_themselves(
    engine: Engine, sessions: sessionmaker[Session]
) -> None:
    injecting({"traceparent": TRACEPARENT})

    assert kept(engine, sessions, {"traceparent": "mine"}) == {"traceparent": "mine"}
    with unit_of_work(sessions, {"a": "x" * MAX_HEADER_BYTES}) as uow, pytest.raises(InvalidEvent, match="headers"):
        uow.emit(a_quote())


def test_no_span_is_no_trace(engine: Engine, sessions: sessionmaker[Session]) -> None:
    assert not trace.get_current_span().get_span_context().is_valid

    assert kept(engine, sessions) == {}
