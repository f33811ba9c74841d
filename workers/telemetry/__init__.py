"""Logs and traces, set up once per process. This docstring is the catalogue.

Logs     one line an event, to stderr: time, level, what happened, then facts as key=value or JSON.
         Secrets and phone numbers are masked in every value, whatever put them there.
Traces   relay.publish (one a batch), consume.bundle (one a bundle, linked to each event's writer).
         They are exported over OTLP/HTTP when DOVECOTE_TELEMETRY__OTLP_ENDPOINT is set.
"""

from workers import settings as options
from workers.telemetry.logs import configure_logs
from workers.telemetry.traces import configure_traces, links_to, trace_id, tracer

__all__ = ["configure", "links_to", "trace_id", "tracer"]


def configure(telemetry: "options.Telemetry", component: str) -> None:
    """Set up logs and traces of this process; the last call wins."""
    configure_logs(telemetry, component)
    if telemetry.otlp_endpoint:
        configure_traces(telemetry.otlp_endpoint, telemetry.sample_ratio, component)
