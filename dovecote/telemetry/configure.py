"""Set up logs and traces of a process, once."""

from dovecote import settings as options
from dovecote.telemetry.logs import configure_logs


def configure(telemetry: "options.Telemetry", component: str) -> None:
    """Set up logs and traces of this process; the last call wins."""
    configure_logs(telemetry, component)
    if telemetry.otlp_endpoint:
        from dovecote.telemetry.export import configure_traces  # the SDK takes memory and time

        configure_traces(telemetry.otlp_endpoint, telemetry.sample_ratio, component)
