"""Spans and where they go. A trace starts in the writer; the traceparent in the row's headers continues it here."""

from collections.abc import Iterable

from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

tracer = trace.get_tracer("dovecote")


def links_to(traceparents: Iterable[str | None]) -> list[trace.Link]:
    """Return a span link to each writer's span, for a bundle that continues many traces at once."""
    contexts = (
        trace.get_current_span(extract({"traceparent": traceparent})).get_span_context()
        for traceparent in dict.fromkeys(traceparents)
        if traceparent
    )
    return [trace.Link(context) for context in contexts if context.is_valid]


def trace_id(traceparent: str | None) -> str | None:
    """Return the trace that is being recorded here, else the one that wrote the event, if any did."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid and traceparent:
        context = trace.get_current_span(extract({"traceparent": traceparent})).get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def configure_traces(endpoint: str, sample_ratio: float, component: str) -> None:
    """Export spans over OTLP/HTTP; `sample_ratio` is the share of the traces that start here."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # slow to import

    provider = TracerProvider(
        resource=Resource.create({"service.name": "dovecote", "service.instance.id": component}),
        sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    trace.set_tracer_provider(provider)
