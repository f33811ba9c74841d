"""What a process shows on its port: /metrics, /health/live, /health/ready. Nothing is shown on port 0.

Imported by the composition root where there is a port, because prometheus_client takes its time to import.
"""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry

from workers.routes import Route
from workers.settings import Settings
from workers.telemetry.health import Missing, health, require_fresh, servers
from workers.telemetry.metrics import (
    ConsumerMetrics,
    RelayMetrics,
    as_text,
    heartbeats,
    shared_directory,
    told_by_all,
)
from workers.telemetry.serving import Page, serve
from workers.telemetry.survey import Survey

# What a relay does while all is well. It searches for what Redis has lost as the leader.
_AT_WORK = ("leading", "standing_by", "sending_again")


def show_relay(settings: Settings, routes: Sequence[Route]) -> RelayMetrics:
    """Serve the pages of a relay from now on; return what it has to tell of its work."""
    registry = CollectorRegistry()
    metrics = RelayMetrics(registry)
    registry.register(Survey(settings, routes))

    def alive() -> str:
        if metrics.state == "sending_again":
            return "it looks for what Redis has lost, which takes as long as the history is"
        return require_fresh("the relay", metrics.heartbeat)

    def relay() -> str:
        state = metrics.state.replace("_", " ")
        if metrics.state not in _AT_WORK:
            raise Missing(state)
        alive()
        return state

    _serve(settings, lambda: registry, {"heartbeat": alive}, {**servers(settings), "relay": relay})
    return metrics


def show_consumers(settings: Settings, routes: Iterable[Route]) -> ConsumerMetrics:
    """Serve the pages of all workers of this Dramatiq master, or stand by for whoever does."""
    directory = shared_directory()

    def workers() -> str:
        alive = heartbeats(directory)
        if not alive:
            raise Missing("no worker has given a sign of life yet")
        for pid, heartbeat in alive.items():
            require_fresh(f"worker {pid}", heartbeat)
        return f"{len(alive)} alive"

    metrics = ConsumerMetrics(route.handler for route in routes)
    _serve(
        settings,
        lambda: told_by_all(directory),
        {"workers": workers},
        {**servers(settings), "workers": workers},
    )
    return metrics


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
