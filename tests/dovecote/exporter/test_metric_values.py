"""Relay and consumers report what befalls them: failures, waiting, dead workers, a Redis that forgets."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from dramatiq.common import current_millis
from prometheus_client import CollectorRegistry

from domain.pricing import PriceQuoted
from dovecote.errors import Refused
from dovecote.exporter.metrics import ConsumerMetrics, RelayMetrics
from dovecote.local.servers import Redis
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.unit_of_work import UnitOfWork
from tests.conftest import settings_for
from tests.support.effects import a_route, make_room_for_effects, note_as, write_quotes
from tests.support.processes import a_place_for_servers, eventually
from tests.support.scraping import numbers_in, of_all
from tests.support.system import System, system_for

HANDLER = "test.note"


@pytest.fixture
def system_with(settings: Settings, directory: Path) -> Iterator[Callable[[Route], System]]:
    """Builds this test's system, whose consumers count."""
    with ExitStack() as stack:

        def build(route: Route) -> System:
            system = stack.enter_context(system_for(settings, [route], ConsumerMetrics([HANDLER])))
            make_room_for_effects(system.engine)
            return system

        yield build


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def keys(system: System, pattern: str) -> list[bytes]:
    client: Any = system.broker.client
    return list(client.scan_iter(f"{system.settings.redis.namespace}:{pattern}"))


def test_failures_retries_and_what_waits_behind_them_are_counted(
    system_with: Callable[[Route], System], directory: Path, registry: CollectorRegistry
) -> None:
    is_mended = threading.Event()

    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        if event.price == 1 and not is_mended.is_set():
            raise RuntimeError("not this time")
        if event.price == 3:
            raise Refused("never")
        note_as(HANDLER, event, uow)

    system = system_with(a_route(function=act, ordered=True, max_attempts=50))
    with system.relay(RelayMetrics(registry)), system.workers():
        write_quotes(system, [1, 2, 3])
        eventually(lambda: of_all(directory)("dovecote_parked_events_total", handler=HANDLER) >= 2, 20, "two that wait")
        eventually(
            lambda: of_all(directory)("dovecote_failed_events_total", handler=HANDLER, state="retrying") >= 2,
            20,
            "a retry that fails",
        )
        is_mended.set()
        system.until_quiet()

    numbers = of_all(directory)
    assert numbers("dovecote_processed_events_total", handler=HANDLER) == 2
    assert numbers("dovecote_failed_events_total", handler=HANDLER, state="dead") == 1
    assert numbers_in(registry)("dovecote_retried_events_total") >= 2
    assert numbers("dovecote_commit_to_effect_seconds_count", handler=HANDLER) == 2
    calls = numbers("dovecote_handler_duration_seconds_count", handler=HANDLER)
    assert calls >= 2 + 1 + numbers("dovecote_failed_events_total", handler=HANDLER, state="retrying")


def test_an_ordinary_handler_is_called_once_an_event(system_with: Callable[[Route], System], directory: Path) -> None:
    system = system_with(a_route(function=lambda *_: None, bundle_size=10))
    with system.running():
        write_quotes(system, range(20))
        system.until_quiet()

    assert of_all(directory)("dovecote_handler_duration_seconds_count", handler=HANDLER) == 20


def test_a_bulk_handler_is_called_once_a_bundle(system_with: Callable[[Route], System], directory: Path) -> None:
    system = system_with(a_route(function=lambda *_: None, bundle_size=10, bulk=True))
    with system.running():
        write_quotes(system, range(20))
        system.until_quiet()

    numbers = of_all(directory)
    assert numbers("dovecote_handler_duration_seconds_count", handler=HANDLER) == numbers(
        "dovecote_bundle_events_count", handler=HANDLER
    )
    assert numbers("dovecote_bundle_events_sum", handler=HANDLER) == 20


def test_messages_of_dead_workers_and_those_that_redis_lost_are_counted(
    system_with: Callable[[Route], System], registry: CollectorRegistry
) -> None:
    system = system_with(a_route(bundle_size=10))
    client: Any = system.broker.client
    with system.relay(RelayMetrics(registry)):
        write_quotes(system, range(50))
        eventually(lambda: client.llen(f"{system.settings.redis.namespace}:test") == 5, 10, "five messages")
        system.broker.do_fetch("test", 3)
        heartbeats = f"{system.settings.redis.namespace}:__heartbeats__"
        client.zadd(heartbeats, {system.broker.broker_id: current_millis() - 3_600_000})
        eventually(lambda: numbers_in(registry)("dovecote_reaped_messages_total") == 3, 10, "three requeued")

        for key in keys(system, "*"):
            client.delete(key)

        eventually(lambda: numbers_in(registry)("dovecote_republished_bundles_total") == 5, 10, "all sent again")


def test_a_relay_reports_for_which_server_it_waits(fresh_database_url: str, tmp_path: Path) -> None:
    metrics = RelayMetrics(CollectorRegistry())
    with a_place_for_servers() as place:
        redis = Redis(place / "redis")
        server = redis.start()
        try:
            settings = settings_for(fresh_database_url, server.url, tmp_path)
            with system_for(settings, [a_route()]) as system, system.relay(metrics):
                eventually(lambda: metrics.state == "leading", 10, "a leader")
                redis.stop()
                eventually(lambda: metrics.state == "waiting_for_redis", 10, "a relay that waits for Redis")
                redis.start(server.port)
                eventually(lambda: metrics.state == "leading", 10, "a leader again")
        finally:
            redis.stop()


def test_a_relay_reports_that_postgres_is_away(settings: Settings, tmp_path: Path) -> None:
    metrics = RelayMetrics(CollectorRegistry())
    nowhere = settings_for("postgresql://me@127.0.0.1:1/x", settings.redis.url.get_secret_value(), tmp_path)

    with system_for(nowhere, [a_route()]) as system, system.relay(metrics):
        eventually(lambda: metrics.state == "waiting_for_postgres", 10, "a relay that waits for Postgres")
