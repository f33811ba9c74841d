"""One trace shows an event's whole way: its writer, the relay, its handlers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import SpanContext, SpanKind, StatusCode, Tracer

from domain.pricing import PriceQuoted
from dovecote.envelope import Envelope
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.telemetry import export, traces
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.effects import a_route, effects_in, make_room_for_effects
from tests.support.quotes import a_quote
from tests.support.system import System, system_for

KEPT = TracerProvider(sampler=ALWAYS_ON).get_tracer("a service")
NOT_KEPT = TracerProvider(sampler=ALWAYS_OFF).get_tracer("a service")


class Spans:
    """What relay and consumers have exported, with all of their own traces kept."""

    def __init__(self, sample_ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = export.provider_for(sample_ratio, "test")
        self.provider.add_span_processor(SimpleSpanProcessor(export.Masking(self._exporter)))
        self.tracer = self.provider.get_tracer("dovecote")

    def named(self, *names: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name in names or not names]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    spans = Spans()
    monkeypatch.setattr(traces, "tracer", spans.tracer)
    return spans


Carry = Callable[..., System]


@pytest.fixture
def carry(settings: Settings) -> Carry:
    """Let relay and consumers do with what `writes` writes, all of it committed before they start."""

    def run(writes: Callable[[System], object], *routes: Route) -> System:
        with system_for(settings, routes) as system:
            make_room_for_effects(system.engine)
            writes(system)
            with system.running():
                system.until_quiet()
            return system

    return run


def write(system: System, tracer: Tracer, *prices: int, symbol: str = "EUR") -> SpanContext:
    """Emit quotes from a service's span, in one transaction."""
    headers = {"correlation_id": "request-17"}
    with tracer.start_as_current_span("a request") as request, unit_of_work(system.sessions, headers=headers) as uow:
        for price in prices:
            uow.emit(a_quote(symbol, price))
    return request.get_span_context()


def parents(spans: Sequence[ReadableSpan]) -> set[tuple[int, int]]:
    return {(span.context.trace_id, span.parent.span_id) for span in spans if span.parent}


def during(inner: ReadableSpan, outer: ReadableSpan) -> bool:
    assert inner.start_time
    assert inner.end_time
    assert outer.start_time
    assert outer.end_time
    return outer.start_time <= inner.start_time <= inner.end_time <= outer.end_time


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def test_writer_relay_and_handler_are_one_trace(spans: Spans, carry: Carry) -> None:
    requests: list[SpanContext] = []

    def act(event: PriceQuoted, *_: object) -> None:
        with spans.provider.get_tracer("a handler").start_as_current_span("reckon"):
            pass

    system = carry(lambda system: requests.append(write(system, KEPT, 1)), a_route(function=act))

    (request,) = requests
    (sent,), (processed,), (reckoned,) = (spans.named(name) for name in ("send test", "process test", "reckon"))
    assert {span.context.trace_id for span in (sent, processed, reckoned)} == {request.trace_id}
    assert parents([sent, processed]) == {(request.trace_id, request.span_id)}
    assert parents([reckoned]) == {(request.trace_id, processed.context.span_id)}
    assert (sent.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    assert during(reckoned, processed)
    assert processed.status.status_code is StatusCode.UNSET
    with system.engine.connect() as connection:
        (event_id,) = connection.exec_driver_sql("select id::text from dovecote.outbox").scalars()
    for span, operation in ((sent, "send"), (processed, "process")):
        assert dict(span.attributes or {}) == {
            "messaging.system": "dovecote",
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
            "messaging.destination.name": "test",
            "messaging.consumer.group.name": "test.note",
            "messaging.message.id": event_id,
            "messaging.message.conversation_id": "request-17",
        }


def test_what_a_handler_emits_goes_on_in_the_same_trace(spans: Spans, carry: Carry) -> None:
    def act(event: PriceQuoted, uow: UnitOfWork, _: object) -> None:
        if event.symbol == "EUR":
            uow.emit(a_quote("USD", 2))

    carry(lambda system: write(system, KEPT, 1), a_route(function=act))

    first, second = spans.named("process test")
    assert second.context.trace_id == first.context.trace_id
    assert parents([second]) == {(first.context.trace_id, first.context.span_id)}


def test_batch_and_bundle_have_traces_of_their_own_linked_to_the_writers(spans: Spans, carry: Carry) -> None:
    requests: list[SpanContext] = []

    def writes(system: System) -> None:
        requests.extend(write(system, tracer, price) for price, tracer in enumerate([KEPT, NOT_KEPT, KEPT]))

    carry(writes, a_route())

    first, not_kept, last = (request.span_id for request in requests)
    (batch,), (bundle,) = spans.named("publish"), spans.named("consume test")
    assert linked(batch) == [first, last]
    assert linked(bundle) == [first, not_kept, last]
    assert {batch.parent, bundle.parent} == {None}
    for span, operation, operation_type in ((batch, "publish", "send"), (bundle, "consume", "process")):
        assert span.attributes
        assert span.attributes["messaging.operation.name"] == operation
        assert span.attributes["messaging.operation.type"] == operation_type
        assert span.attributes["messaging.batch.message_count"] == 3
    assert parents(spans.named("send test")) == {(r.trace_id, r.span_id) for r in (requests[0], requests[2])}


def test_a_bundle_s_links_are_all_kept(spans: Spans, carry: Carry) -> None:
    def writes(system: System) -> None:
        for price in range(200):
            write(system, KEPT, price)

    carry(writes, a_route(bundle_size=500, bulk=True, function=lambda *_: None))

    assert [len(span.links) for span in spans.named("publish", "consume test")] == [200, 200]


def test_each_event_of_a_bulk_handler_has_the_handler_s_span_in_its_own_trace(spans: Spans, carry: Carry) -> None:
    requests: list[SpanContext] = []

    def act(envelopes: Sequence[Envelope], *_: object) -> None:
        with spans.provider.get_tracer("a handler").start_as_current_span("reckon"):
            pass

    def writes(system: System) -> None:
        requests.extend(write(system, tracer, price) for price, tracer in enumerate([KEPT, KEPT, NOT_KEPT]))

    carry(writes, a_route(function=act, bulk=True))

    processed, (reckoned,), (bundle,) = (spans.named(name) for name in ("process test", "reckon", "consume test"))
    assert parents(processed) == {(request.trace_id, request.span_id) for request in requests[:2]}
    assert len({span.end_time for span in processed}) == 1
    for span in processed:
        assert during(reckoned, span)
    assert parents([reckoned]) == {(bundle.context.trace_id, bundle.context.span_id)}


def test_a_message_for_each_handler_is_sent_and_processed(spans: Spans, carry: Carry) -> None:
    carry(lambda system: write(system, KEPT, 1), a_route("one", queue="first"), a_route("two", queue="second"))

    names = {span.name for span in spans.named()}
    assert names >= {"send first", "send second", "process first", "process second"}


@pytest.mark.parametrize("bulk", [False, True])
def test_a_failure_is_recorded_in_the_event_s_trace_without_secrets(spans: Spans, carry: Carry, bulk: bool) -> None:
    def act(_: object, *__: object) -> None:
        try:
            raise LookupError("no route to +12015550123")
        except LookupError as error:
            raise ValueError("redis://:hunter2@cache said no to +49 151 12345678") from error

    requests: list[SpanContext] = []
    system = carry(
        lambda system: requests.append(write(system, KEPT, 1)), a_route(function=act, bulk=bulk, max_attempts=1)
    )

    (processed,) = spans.named("process test")
    assert processed.attributes
    assert processed.attributes["error.type"] == "ValueError"
    assert processed.status.status_code is StatusCode.ERROR
    assert processed.status.description == "ValueError: redis://:***@cache said no to +***78"
    (exception,) = processed.events
    assert exception.attributes
    assert exception.attributes["exception.type"] == "ValueError"
    assert exception.attributes["exception.message"] == "redis://:***@cache said no to +***78"
    assert "LookupError: no route to +***23" in str(exception.attributes["exception.stacktrace"])
    with system.engine.connect() as connection:
        recorded = connection.exec_driver_sql("select trace_id from dovecote.deliveries").scalars().all()
    assert recorded == [f"{requests[0].trace_id:032x}"]


def test_a_failing_bundle_says_whose_fault_it_was_when_its_events_are_alone(spans: Spans, carry: Carry) -> None:
    def act(envelopes: Sequence[Any], *_: object) -> None:
        if any(envelope.event.price == 2 for envelope in envelopes):
            raise ValueError("two")

    carry(lambda system: write(system, KEPT, 1, 2), a_route(function=act, bulk=True, max_attempts=1))

    together, alone = spans.named("process test")[:2], spans.named("process test")[2:]
    assert [(span.status.status_code, len(span.events)) for span in together] == [(StatusCode.ERROR, 0)] * 2
    assert [(span.status.status_code, len(span.events)) for span in alone] == [
        (StatusCode.UNSET, 0),
        (StatusCode.ERROR, 1),
    ]


def test_what_a_handler_puts_into_its_own_spans_is_masked(spans: Spans, carry: Carry) -> None:
    def act(event: PriceQuoted, *_: object) -> None:
        with spans.provider.get_tracer("a handler").start_as_current_span("call +12015550123") as span:
            span.set_attributes({"url": "redis://:hunter2@cache", "to": ["+12015550123"], "password": "hunter2 twice"})
            span.add_event("dialled +12015550123", {"phone": 12015550123})
            raise ValueError("token=hunter2")

    carry(lambda system: write(system, KEPT, 1), a_route(function=act, max_attempts=1))

    (called,) = spans.named("call +***23")
    exported = called.to_json()
    assert "2015550123" not in exported
    assert "hunter2" not in exported
    assert [event.name for event in called.events] == ["dialled +***23", "exception"]


def test_what_is_not_sampled_makes_no_span(monkeypatch: pytest.MonkeyPatch, carry: Carry) -> None:
    spans = Spans(sample_ratio=0.0)
    monkeypatch.setattr(traces, "tracer", spans.tracer)
    # What reads like a sampled trace is only the name of an aggregate, and what is in a payload.
    looks_sampled = f'E","traceparent":"00-{"a" * 32}-{"b" * 16}-01'

    system = carry(
        lambda system: (write(system, NOT_KEPT, 1), write(system, NOT_KEPT, 2, symbol=looks_sampled)), a_route()
    )

    assert len(effects_in(system.engine)) == 2
    assert spans.named() == []


@pytest.mark.parametrize(
    "traceparent", ["", "nonsense", "00-x-01", f"00-{'0' * 32}-{'b' * 16}-01", f"00-{'a' * 32}-{'b' * 16}-01-more"]
)
def test_a_traceparent_that_is_none_is_no_reason_to_lose_the_event(
    spans: Spans, carry: Carry, traceparent: str
) -> None:
    def writes(system: System) -> None:
        with unit_of_work(system.sessions, headers={"traceparent": traceparent}) as uow:
            uow.emit(a_quote("EUR", 1))

    system = carry(writes, a_route())

    assert len(effects_in(system.engine)) == 1
    assert spans.named("send test", "process test") == []


def test_a_trace_whose_id_is_random_is_sampled_too(spans: Spans, carry: Carry) -> None:
    def writes(system: System) -> None:
        with unit_of_work(system.sessions, headers={"traceparent": f"00-{'a' * 32}-{'b' * 16}-03"}) as uow:
            uow.emit(a_quote("EUR", 1))

    carry(writes, a_route())

    assert len(spans.named("send test", "process test")) == 2
