"""Logs and traces, set up once per process. This docstring is the catalogue.

Logs     one line an event, to stderr: time, level, what happened, then facts as key=value or JSON. Always
         `component`. While an event is at work, whoever logs: `handler`, `event_id`, `aggregate` (type and id),
         `correlation_id`, and `trace_id` and `span_id` where its writer traces; for a bundle that is taken at once
         `handler` and `events`, how many. Secrets and phone numbers are masked in every value, whatever put them there.
Traces   one from the writer over the relay to the handler, in the writer's trace where the writer samples it:
           send <queue>      producer; the relay, for each message that the event goes out in
           process <queue>   consumer; each call of a handler, and its failure: error.type, status, exception
         with messaging.message.id (the event's), messaging.message.conversation_id (its correlation id),
         messaging.destination.name (queue), messaging.consumer.group.name (handler). Of many events at once, in
         traces of their own, of which DOVECOTE_TELEMETRY__SAMPLE_RATIO are kept, linked to the writers' spans:
           publish           producer; a batch of the relay
           consume <queue>   consumer; a bundle
         with messaging.batch.message_count. All have messaging.system and messaging.operation.name and .type.
         The resource says service.name, .version, .instance.id, host.name, process.pid and dovecote.component.
         They are exported over OTLP/HTTP when DOVECOTE_TELEMETRY__OTLP_ENDPOINT is set, masked as logs are.
"""

from workers import settings as options
from workers.telemetry.logs import configure_logs, log_uncaught
from workers.telemetry.traces import (
    acting_on,
    acting_on_all,
    configure_traces,
    consuming,
    end_traces,
    publishing,
    trace_id,
)
from workers.telemetry.work import now_at_work

__all__ = [
    "acting_on",
    "acting_on_all",
    "configure",
    "consuming",
    "end_traces",
    "log_uncaught",
    "now_at_work",
    "publishing",
    "trace_id",
]


def configure(telemetry: "options.Telemetry", component: str) -> None:
    """Set up logs and traces of this process; the last call wins."""
    configure_logs(telemetry, component)
    if telemetry.otlp_endpoint:
        configure_traces(telemetry.otlp_endpoint, telemetry.sample_ratio, component)
