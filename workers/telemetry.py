"""Logs and traces, set up once per process. This docstring is the catalogue.

Logs     one line an event, to stderr: time, level, what happened, then facts as key=value or JSON.
         Secrets and phone numbers are masked in every value, whatever put them there.
Traces   relay.publish (one a batch), consume.bundle (one a bundle, linked to each event's writer).
         They are exported over OTLP/HTTP when DOVECOTE_TELEMETRY__OTLP_ENDPOINT is set.
"""

import logging
import sys
from collections.abc import Iterable

import structlog
from dramatiq import Message
from dramatiq.broker import MessageProxy
from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from structlog.typing import Processor

from workers import settings as options
from workers.masking import masked

tracer = trace.get_tracer("dovecote")


def configure(telemetry: "options.Telemetry", component: str) -> None:
    """Set up logs and traces of this process; the last call wins."""
    _configure_logs(telemetry, component)
    if telemetry.otlp_endpoint:
        _configure_traces(telemetry.otlp_endpoint, telemetry.sample_ratio, component)


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


def _configure_logs(telemetry: "options.Telemetry", component: str) -> None:
    for_people = telemetry.log_format == "console" or (telemetry.log_format == "auto" and sys.stderr.isatty())
    level = getattr(logging, telemetry.log_level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if for_people else "iso", utc=not for_people),
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, sort_keys=False)
        if for_people
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_name_messages)
    handler.setFormatter(
        _MaskingFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Libraries speak up when something is wrong; their small talk is for debugging.
    for name in ("dramatiq", "alembic", "opentelemetry"):
        logging.getLogger(name).setLevel(max(level, logging.WARNING) if level > logging.DEBUG else level)
    structlog.contextvars.clear_contextvars()
    if not for_people:
        structlog.contextvars.bind_contextvars(component=component)


def _name_messages(record: logging.LogRecord) -> bool:
    """Let Dramatiq's own lines name a message instead of printing it: it holds hundreds of payloads."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            f"{value.actor_name} {value.message_id}" if isinstance(value, Message | MessageProxy) else value
            for value in record.args
        )
    return True


class _MaskingFormatter(structlog.stdlib.ProcessorFormatter):
    """Masks the finished line, so that nothing escapes: no value, no traceback, no library's own words."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


def _configure_traces(endpoint: str, sample_ratio: float, component: str) -> None:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # slow to import

    provider = TracerProvider(
        resource=Resource.create({"service.name": "dovecote", "service.instance.id": component}),
        sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
    trace.set_tracer_provider(provider)
