"""What a process shows on its port: /metrics, /health/live, /health/ready. Nothing is shown on port 0.

Imported by the composition root where there is a port, because prometheus_client takes its time to import.
"""

from collections.abc import Callable

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

from dovecote.exporter.collector import SystemCollector
from dovecote.exporter.health import Missing, health, require_fresh, servers
from dovecote.exporter.http import Page, serve
from dovecote.exporter.metrics import (
    ConsumerMetrics,
    OwnHeartbeat,
    RelayMetrics,
    as_text,
    heartbeats,
    merged_registry,
    shared_directory,
)
from dovecote.processes.state_directory import StateDirectoryError
from dovecote.route import Dovecote
from dovecote.settings import Settings
from dovecote.telemetry.instrumentation import ConsumerInstrumentation

log = structlog.get_logger()

# What a relay does while all is well. It searches for what Redis has lost as the leader.
_WORKING = ("leading", "standing_by", "sending_again")


def show_relay(settings: Settings, app: Dovecote) -> RelayMetrics:
    """Serve the pages of a relay from now on; return its instrumentation."""
    registry = CollectorRegistry()
    metrics = RelayMetrics(registry)
    registry.register(SystemCollector(settings, app.routes))

    def alive() -> str:
        if metrics.state == "sending_again":
            return "it looks for what Redis has lost, which takes as long as the history is"
        return require_fresh("the relay", metrics.heartbeat)

    def relay() -> str:
        state = metrics.state.replace("_", " ")
        if metrics.state not in _WORKING:
            raise Missing(state)
        alive()
        return state

    _serve(settings, lambda: registry, {"heartbeat": alive}, {**_servers(settings, app), "relay": relay})
    return metrics


def show_consumers(settings: Settings, app: Dovecote) -> ConsumerInstrumentation:
    """Serve the pages of all workers of this Dramatiq master, or stand by for the process that does.

    Without a place for the metrics there are none. Events are acted on all the same.
    """
    try:
        directory = shared_directory(settings.database.url.get_secret_value())
        metrics = ConsumerMetrics(route.handler for route in app.routes)
    except (StateDirectoryError, OSError) as error:
        log.warning("metrics have no place, so there are none: name another one in TMPDIR", error=str(error))
        return _show_without_metrics(settings, app)

    def workers() -> str:
        alive = heartbeats(directory)
        if not alive:
            raise Missing("no worker has given a sign of life yet")
        for pid, heartbeat in alive.items():
            require_fresh(f"worker {pid}", heartbeat)
        return f"{len(alive)} alive"

    _serve(
        settings,
        lambda: merged_registry(directory),
        {"workers": workers},
        {**_servers(settings, app), "workers": workers},
    )
    return metrics


def _show_without_metrics(settings: Settings, app: Dovecote) -> OwnHeartbeat:
    own = OwnHeartbeat()

    def alive() -> str:
        return require_fresh("the worker that answers", own.heartbeat)

    _serve(
        settings,
        CollectorRegistry,
        {"workers": alive},
        {**_servers(settings, app), "workers": alive},
    )
    return own


def _servers(settings: Settings, app: Dovecote) -> dict[str, Callable[[], str]]:
    return servers(settings, app.migration_locations)


def _serve(
    settings: Settings,
    registry: Callable[[], CollectorRegistry],
    live: dict[str, Callable[[], str]],
    ready: dict[str, Callable[[], str]],
) -> None:
    telemetry = settings.telemetry
    pages = {
        "/metrics": lambda: Page(200, CONTENT_TYPE_LATEST, as_text(registry())),
        "/health/live": health(live, "live"),
        "/health/ready": health(ready, "ready"),
    }
    serve(telemetry.http_host, telemetry.http_port, pages)
