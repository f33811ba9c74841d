"""How the whole system stands, collected at each scrape. Every relay reports it, also a standby.

So a leader that is frozen hides nothing, and what nobody asks for costs nothing. Several relays say the same:
rules and dashboards take the largest.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import redis
import sqlalchemy.exc
import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection

from dovecote import operations
from dovecote.broker.redis_client import connect_redis
from dovecote.operations.aggregates import count_blocked
from dovecote.operations.snapshot import snapshot
from dovecote.route import Route, queues
from dovecote.settings import Settings
from dovecote.store.checks import NOTIFY_QUEUE, OLDEST_WRITER, PARTITIONS, POSTPONED
from dovecote.store.connections import NO_TIME_LIMITS, ONLY_OUR_NAMES, connect
from dovecote.store.delivery_state import DeliveryState
from dovecote.store.foreign_locks import ForeignLock
from dovecote.store.loaders import loads_anything
from dovecote.telemetry.failures import is_transient

log = structlog.get_logger()

# Several scrapers, or an eager one, cost no more than one does.
_KEPT_SECONDS = 5.0
_LIMIT_SECONDS = 2
# Prometheus gives a scrape up after 10 s.
_STATEMENT_MS = 5_000

_BEHIND = "Positions between the handler's low-water mark and the relay's checkpoint."
_MARKS = """
    select p.handler_name, greatest(0, s.checkpoint - p.low_water_mark) as positions
    from dovecote.progress p, dovecote.relay_state s
"""
_POSTPONED = "How long the handler's queue has been full, or it has been catching up since; 0 when it is live."

_DEAD_LETTERS = "Messages of the queue that nobody could read or that were given up, in Redis."


class SystemCollector(Collector):
    """Asks Postgres and Redis on a short connection each; a server that is away is a number too."""

    def __init__(self, settings: Settings, routes: Sequence[Route]) -> None:
        self._settings = settings
        self._routes = routes
        self._engine = loads_anything(
            connect(
                settings.database.url.get_secret_value(),
                pool_size=1,
                connect_timeout_seconds=_LIMIT_SECONDS,
                statement_timeout_ms=_STATEMENT_MS,
                application_name="dovecote metrics",
                session_settings={**NO_TIME_LIMITS, **ONLY_OUR_NAMES},
            )
        )
        self._lock = threading.Lock()
        self._found: list[Metric] = []
        self._found_at = float("-inf")

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            if time.monotonic() - self._found_at >= _KEPT_SECONDS:
                self._found = self._look()
                self._found_at = time.monotonic()
            return self._found

    def _look(self) -> list[Metric]:
        up: dict[str, bool] = {}
        ahead_seconds: dict[str, float] = {}
        found: list[Metric] = []
        try:
            found = self._ask_postgres(ahead_seconds)
            up["postgres"] = True
        except sqlalchemy.exc.DBAPIError as error:
            up["postgres"] = not is_transient(error)
            if up["postgres"]:  # such as a schema that is still older than this code
                log.warning("how the system stands is not known", error=f"{type(error).__name__}: {error}")
        finally:
            self._engine.dispose()
        dead_letters: dict[str, float] = {}
        try:
            ahead_seconds["redis"] = self._ask_redis(dead_letters)
            up["redis"] = True
        except redis.RedisError:
            up["redis"] = False
        return [
            _gauge("dovecote_up", "Whether the server answers.", up, "server"),
            _gauge(
                "dovecote_clock_skew_seconds", "How far its clock is ahead of this machine's.", ahead_seconds, "server"
            ),
            _gauge("dovecote_redis_dead_letters", _DEAD_LETTERS, dead_letters, "queue"),
            *found,
        ]

    def _ask_postgres(self, ahead_seconds: dict[str, float]) -> list[Metric]:
        status = operations.status.get_status(self._engine, self._routes)
        with snapshot(self._engine) as connection:
            before = time.time()
            there = connection.exec_driver_sql("select extract(epoch from clock_timestamp())::float8").scalar_one()
            ahead_seconds["postgres"] = there - (before + time.time()) / 2
            return [
                *_of_relay(status),
                *_of_handlers(status.handlers, count_blocked(connection, self._routes)),
                _gauge("dovecote_postponed_seconds", _POSTPONED, self._postponed(connection), "handler"),
                _gauge("dovecote_handler_low_water_mark_lag_events", _BEHIND, self._behind(connection), "handler"),
                *_of_writers_and_weeks(connection),
            ]

    def _postponed(self, connection: Connection) -> dict[str, float]:
        since = {row.handler_name: row.seconds for row in connection.exec_driver_sql(POSTPONED)}
        return {route.handler: since.get(route.handler, 0.0) for route in self._routes}

    def _behind(self, connection: Connection) -> dict[str, float]:
        behind = {row.handler_name: row.positions for row in connection.exec_driver_sql(_MARKS)}
        # No relay has led with a handler that has no mark: nothing can be said of it.
        return {route.handler: behind[route.handler] for route in self._routes if route.handler in behind}

    def _ask_redis(self, dead_letters: dict[str, float]) -> float:
        client: Any = connect_redis(self._settings.redis.url.get_secret_value(), _LIMIT_SECONDS)
        try:
            client.ping()  # so that the connection is there before the clock is looked at
            before = time.time()
            seconds, microseconds = client.time()
            ahead = float(seconds + microseconds / 1e6 - (before + time.time()) / 2)
            for queue in queues(self._routes):
                with suppress(redis.ResponseError):  # somebody else's: of another type, until the relay deletes it
                    dead_letters[queue] = client.zcard(f"{self._settings.redis.namespace}:{queue}.XQ")
            return ahead
        finally:
            client.close()


def _of_relay(status: operations.status.Status) -> list[Metric]:
    relay = status.relay
    return [
        _gauge("dovecote_leader_present", "Whether a relay leads.", {"": relay.leading}),
        _gauge(
            "dovecote_sequence_fault",
            "Whether positions are not handed out in order; no relay leads then.",
            {"": relay.fault is not None},
        ),
        _foreign_locks(relay.foreign_locks),
        _gauge("dovecote_lag_events", "Committed and not yet published; at least.", {"": relay.lag_events}),
        _gauge("dovecote_lag_seconds", "Age of the oldest of them.", {"": relay.lag_seconds}),
        _gauge(
            "dovecote_unrouted_events",
            "Events met that no handler wants, of types that still have no route.",
            {"": sum(unrouted.events for unrouted in status.unrouted)},
        ),
    ]


def _foreign_locks(found: Sequence[ForeignLock]) -> Metric:
    held = dict.fromkeys(("announcement", "wake-up", "leadership", "release", "table"), 0)
    for lock in found:
        held[lock.purpose] = held.get(lock.purpose, 0) + lock.locks
    return _gauge("dovecote_foreign_locks", "Locks of ours held by sessions with no use for them.", held, "purpose")


def _of_handlers(handlers: Mapping[str, operations.status.HandlerStatus], blocked: Mapping[str, int]) -> list[Metric]:
    now = datetime.now(UTC)
    deliveries = GaugeMetricFamily(
        "dovecote_deliveries", "What did not go well, by state; at least.", labels=["handler", "state"]
    )
    for handler, status in handlers.items():
        for state in DeliveryState:
            deliveries.add_metric([handler, state], getattr(status, state))
    return [
        deliveries,
        _gauge(
            "dovecote_unprocessed_events",
            "Neither acted on nor given up; at least where there are 20,000.",
            {handler: status.unprocessed for handler, status in handlers.items()},
            "handler",
        ),
        _gauge(
            "dovecote_oldest_unprocessed_seconds",
            "Age of the oldest of them; 0 for none.",
            {handler: status.oldest_unprocessed_seconds for handler, status in handlers.items()},
            "handler",
        ),
        _gauge("dovecote_blocked_aggregates", "Aggregates that stand still; at least.", blocked, "handler"),
        _gauge(
            "dovecote_paused_seconds",
            "How long the handler has been paused; 0 when it is not.",
            {
                handler: max(0.0, (now - status.paused.since).total_seconds()) if status.paused else 0.0
                for handler, status in handlers.items()
            },
            "handler",
        ),
    ]


def _of_writers_and_weeks(connection: Connection) -> list[Metric]:
    writer = connection.exec_driver_sql(OLDEST_WRITER).one_or_none()
    weeks = connection.exec_driver_sql(PARTITIONS).one()
    return [
        _gauge(
            "dovecote_active_writers",
            "Transactions that are writing to the outbox.",
            {"": writer.held if writer else 0},
        ),
        _gauge(
            "dovecote_oldest_writer_seconds",
            "Age of the writer with the lowest low-water mark.",
            {"": writer.seconds if writer else 0.0},
        ),
        _gauge(
            "dovecote_partition_headroom_seconds",
            "How long from now the partitions made ahead last.",
            {"": weeks.headroom_seconds},
        ),
        _gauge(
            "dovecote_default_partition_in_use",
            "Whether rows lie outside of every week.",
            {"": weeks.defaults is not None},
        ),
        _gauge(
            "dovecote_notify_queue_usage",
            "Which part of Postgres's queue of notifications is in use.",
            {"": connection.exec_driver_sql(NOTIFY_QUEUE).scalar_one()},
        ),
    ]


def _gauge(name: str, meaning: str, values: Mapping[str, float], label: str | None = None) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=[label] if label else [])
    for value_of, value in values.items():
        family.add_metric([value_of] if label else [], value)
    return family
