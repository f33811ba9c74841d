"""Spans and where they go.

One trace shows an event's whole way. It starts in the writer, whose traceparent travels in the row's headers.
Where the writer sampled it, the relay adds `send <queue>` for each message that the event goes out in, and the
consumer `process <queue>` for each call of a handler, rolled back or not; both are children of the writer's span.
A batch and a bundle are of many traces at once: each has a span in a trace of its own, sampled by the ratio and
linked to the writers'. A bundle of one is no exception.

An event that is not sampled costs the relay a search in its bytes, 0.2 to 0.6 us and only where a collector is
configured, and the consumer half a microsecond, most of it for the log (docs/adr/0018-traces.md).
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.semconv.attributes import error_attributes, exception_attributes
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dovecote.envelope import Envelope, read_head
from dovecote.envelope.wire import TRACE_FLAG_AT, TRACEPARENT, TRACEPARENT_FROM, TRACEPARENT_TO
from dovecote.route import Route
from dovecote.telemetry.context import back_to, event_in_flight, set_in_flight
from dovecote.telemetry.failures import Failure, describe

tracer = trace.get_tracer("dovecote")

# How long a collector that does not answer may delay the end of a process.
_SHUTDOWN_TIMEOUT_SECONDS = 3.0

_PROPAGATOR = TraceContextTextMapPropagator()
_ODD = b"13579bdf"
_SAMPLED = frozenset(_ODD.decode())

_UNTRACED = nullcontext()


# The relay -------------------------------------------------------------------------------------


@contextmanager
def publishing(rows: Sequence[tuple[int, str, bytes]], routes_for: Callable[[str], Iterable[Route]]) -> Iterator[None]:
    """Trace a batch: rows of position, type and envelope, sent in this block to those whom `routes_for` a type names.

    A `send` span is made of what was sent: none when the block raises, for then it is sent again.
    """
    # Made afterwards: an event that comes alone waits for everything before the message is on its way.
    began = time.time_ns()
    yield
    ended = time.time_ns()
    attributes = {**_messaging("publish", "send"), "messaging.batch.message_count": len(rows)}
    batch = tracer.start_span("publish", Context(), SpanKind.PRODUCER, attributes, start_time=began)
    # Without a provider no span has an id, and nobody to be sent to.
    for event_type, head in _sampled(rows) if batch.get_span_context().is_valid else ():
        context = _context_of(head["traceparent"])
        if batch.is_recording():
            batch.add_link(trace.get_current_span(context).get_span_context())
        for route in routes_for(event_type):
            _start("send", SpanKind.PRODUCER, context, route, head["id"], head.get("correlationid"), began).end(ended)
    batch.end(ended)


def _sampled(rows: Iterable[tuple[int, str, bytes]]) -> list[tuple[str, dict[str, Any]]]:
    """Return type and attributes of the events whose writers sampled them."""
    found = []
    for _, event_type, envelope in rows:
        at = envelope.find(TRACEPARENT, TRACEPARENT_FROM, TRACEPARENT_TO)
        if at >= 0 and envelope[at + TRACE_FLAG_AT : at + TRACE_FLAG_AT + 1] in _ODD:
            head = read_head(envelope)
            if is_sampled(head["traceparent"]):
                found.append((event_type, head))
    return found


# The consumer ----------------------------------------------------------------------------------


@contextmanager
def consuming(route: Route, envelopes: Sequence[Envelope]) -> Iterator[None]:
    """Trace a bundle; what is logged in this block names the handler and what of the bundle is in flight."""
    token = set_in_flight(route, envelopes)
    attributes = {
        **_messaging("consume", "process"),
        "messaging.destination.name": route.queue,
        "messaging.consumer.group.name": route.handler,
        "messaging.batch.message_count": len(envelopes),
    }
    try:
        with tracer.start_as_current_span(
            f"consume {route.queue}", kind=SpanKind.CONSUMER, attributes=attributes
        ) as span:
            # A link for each event costs as much as acting on it: only for the bundles whose trace is kept.
            if span.is_recording():
                for link in links_to(envelope.traceparent for envelope in envelopes):
                    span.add_link(link.context)
            yield
    finally:
        back_to(token)


def acting_on(route: Route, envelope: Envelope) -> AbstractContextManager[None]:
    """Trace one call of an ordinary handler: spans that it makes are children of the event's."""
    set_in_flight(route, (envelope,))
    return _acting_on_sampled(route, envelope) if is_sampled(envelope.traceparent) else _UNTRACED


@contextmanager
def _acting_on_sampled(route: Route, envelope: Envelope) -> Iterator[None]:
    span = _process(route, envelope)
    with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield
        except BaseException as error:  # also when it is cut off
            _has_failed(span, error, describe(error, envelope))
            raise


@contextmanager
def acting_on_all(route: Route, envelopes: Sequence[Envelope]) -> Iterator[None]:
    """Trace one call of a bulk handler: each event has the same span in its own writer's trace.

    A failure is recorded in the span of an event that was alone in its bundle. The events of larger ones are taken
    in parts next, and the text of the first failure may be about another event.
    """
    set_in_flight(route, envelopes)
    spans = [_process(route, envelope) for envelope in envelopes if is_sampled(envelope.traceparent)]
    try:
        yield
    except BaseException as error:
        if spans:
            failure = describe(error, envelopes[0]) if len(envelopes) == 1 else None
            for span in spans:
                _has_failed(span, error, failure)
        raise
    finally:
        ended = time.time_ns()
        for span in spans:
            span.end(ended)


def _process(route: Route, envelope: Envelope) -> trace.Span:
    context = _context_of(envelope.traceparent)
    return _start("process", SpanKind.CONSUMER, context, route, str(envelope.event_id), envelope.correlation_id)


def _has_failed(span: trace.Span, error: BaseException, failure: Failure | None) -> None:
    span.set_attribute(error_attributes.ERROR_TYPE, type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR, failure.headline if failure else None))
    if failure:
        span.add_event(
            "exception",
            {
                exception_attributes.EXCEPTION_TYPE: failure.type,
                exception_attributes.EXCEPTION_MESSAGE: failure.headline.removeprefix(f"{failure.type}: "),
                exception_attributes.EXCEPTION_STACKTRACE: failure.text,
            },
        )


# One event -------------------------------------------------------------------------------------


def _messaging(operation: str, operation_type: str) -> dict[str, str | int]:
    # Not stable yet, so no constants: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
    return {
        "messaging.system": "dovecote",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation_type,
    }


def _start(
    operation: str,
    kind: SpanKind,
    context: Context,
    route: Route,
    event_id: str,
    correlation_id: object,
    began: int | None = None,
) -> trace.Span:
    attributes = {
        **_messaging(operation, operation),
        "messaging.destination.name": route.queue,
        "messaging.consumer.group.name": route.handler,
        "messaging.message.id": event_id,
    }
    if isinstance(correlation_id, str):
        attributes["messaging.message.conversation_id"] = correlation_id
    return tracer.start_span(f"{operation} {route.queue}", context, kind, attributes, start_time=began)


def is_sampled(traceparent: str | None) -> bool:
    """Return whether the writer keeps its trace."""
    # Most are not, and need no parsing: the last bit of the flags says so.
    return traceparent is not None and traceparent[54:55] in _SAMPLED and _span_context(traceparent).trace_flags.sampled


def links_to(traceparents: Iterable[str | None]) -> list[trace.Link]:
    """Return a span link to each writer's span, for a bundle that continues many traces at once."""
    contexts = (_span_context(traceparent) for traceparent in dict.fromkeys(traceparents) if traceparent)
    return [trace.Link(context) for context in contexts if context.is_valid]


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace that wrote the event, which ours continues; without one, the trace that is recorded here."""
    context = _span_context(traceparent) if traceparent else trace.INVALID_SPAN_CONTEXT
    if not context.is_valid:
        context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else None


def ids() -> Mapping[str, str]:
    """Return trace and span id for a log line: of the span recorded here, else of the one that wrote the event."""
    context = trace.get_current_span().get_span_context()
    if not context.trace_flags.sampled:
        event = event_in_flight()
        context = _span_context(event.traceparent) if event and event.traceparent else trace.INVALID_SPAN_CONTEXT
    if not context.is_valid:
        return {}
    return {
        "trace_id": trace.format_trace_id(context.trace_id),
        "span_id": trace.format_span_id(context.span_id),
    }


def _span_context(traceparent: str) -> trace.SpanContext:
    return trace.get_current_span(_context_of(traceparent)).get_span_context()


def _context_of(traceparent: str | None) -> Context:
    return _PROPAGATOR.extract({"traceparent": traceparent or ""}, Context())


# Where they go ---------------------------------------------------------------------------------


def end_traces() -> None:
    """Send the last spans. A collector that is away delays the end of the process by three seconds at most."""
    # Without an endpoint it is the API's own, which has nothing to send.
    shutdown = getattr(trace.get_tracer_provider(), "shutdown", None)
    if shutdown is not None:
        shutdown_thread = threading.Thread(target=shutdown, name="last spans", daemon=True)
        shutdown_thread.start()
        shutdown_thread.join(_SHUTDOWN_TIMEOUT_SECONDS)
