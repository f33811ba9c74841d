"""Where spans go: over OTLP/HTTP, masked. Imported only where an endpoint is given: the SDK takes memory and time."""

import os
import socket
from collections.abc import Sequence
from importlib.metadata import version
from uuid import uuid4

from opentelemetry import trace
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Status

from dovecote.masking import masked, masked_fields

# A span keeps as many links as a batch has events by default; of more, the last ones.
_MAX_LINKS = 2_000


def configure_traces(endpoint: str, sample_ratio: float, component: str) -> None:
    """Export spans over OTLP/HTTP; `sample_ratio` is the share of the traces that start here."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # slow to import

    exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
    provider = provider_for(sample_ratio, component)
    provider.add_span_processor(BatchSpanProcessor(Masking(exporter)))
    trace.set_tracer_provider(provider)


def provider_for(sample_ratio: float, component: str) -> TracerProvider:
    """Return a provider that sends its spans nowhere yet."""
    ours = Resource.create(
        {
            "service.name": "dovecote",
            "service.version": version("dovecote"),
            "service.instance.id": str(uuid4()),
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
            "dovecote.component": component,
        }
    )
    return TracerProvider(
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
        resource=ours.merge(OTELResourceDetector().detect()),
        sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
        span_limits=SpanLimits(max_links=_MAX_LINKS),
        shutdown_on_exit=False,
    )


class Masking(SpanExporter):
    """Passes spans on without secrets and phone numbers, also those of spans that a handler or a library made."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return self._exporter.export([_masked_span(span) for span in spans])

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


def _masked_span(span: ReadableSpan) -> ReadableSpan:
    description = span.status.description
    return ReadableSpan(
        name=masked(span.name),
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=masked_fields(span.attributes or {}),
        events=[
            Event(masked(event.name), masked_fields(event.attributes or {}), event.timestamp) for event in span.events
        ],
        links=[trace.Link(link.context, masked_fields(link.attributes or {})) for link in span.links],
        kind=span.kind,
        status=Status(span.status.status_code, masked(description) if description else None),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
