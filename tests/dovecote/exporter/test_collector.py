"""A scrape of any relay reports on the whole system, also when a server is away."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, event, text

from dovecote.broker.redis_client import connect_redis
from dovecote.exporter import collector
from dovecote.settings import Settings
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
from tests.conftest import settings_for
from tests.support.effects import a_route
from tests.support.quotes import a_quote
from tests.support.scraping import Numbers, numbers_in

pytestmark = pytest.mark.servers

ROUTES = (a_route("ordered", ordered=True), a_route("any.order"))


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = connect(settings.database.url.get_secret_value())
    yield engine
    engine.dispose()


def found(settings: Settings) -> Numbers:
    registry = CollectorRegistry()
    registry.register(collector.SystemCollector(settings, ROUTES))
    return numbers_in(registry)


def run(engine: Engine, query: str, **parameters: object) -> None:
    with engine.begin() as connection:
        connection.execute(text(query), parameters)


def write(engine: Engine, symbol: str, events: int) -> None:
    with unit_of_work(sessions_for(engine)) as uow:
        for price in range(1, events + 1):
            uow.emit(a_quote(symbol, price))


def deliver(engine: Engine, handler: str, state: str, upto: int) -> None:
    run(
        engine,
        "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type,"
        " state, next_attempt_at)"
        " select :handler, id, position, aggregate_type, aggregate_id, event_type, :state, now() from dovecote.outbox"
        " where position <= :upto",
        handler=handler,
        state=state,
        upto=upto,
    )


def test_an_empty_system_has_weeks_ahead_and_nothing_else(settings: Settings) -> None:
    numbers = found(settings)

    assert numbers.by("server", "dovecote_up") == {"postgres": 1, "redis": 1}
    for name in (
        "lag_events",
        "lag_seconds",
        "leader_present",
        "unrouted_events",
        "active_writers",
        "oldest_writer_seconds",
        "notify_queue_usage",
    ):
        assert numbers(f"dovecote_{name}") == 0, name
    assert numbers("dovecote_default_partition_in_use") == 0
    assert numbers("dovecote_partition_headroom_seconds") > 4 * 604_800
    assert set(numbers.by("handler", "dovecote_paused_seconds").values()) == {0}
    assert set(numbers.by("handler", "dovecote_postponed_seconds").values()) == {0}


def test_what_waits_is_dead_or_lags_is_counted(settings: Settings, engine: Engine) -> None:
    for symbol in ("EUR", "USD"):
        write(engine, symbol, 3)
    deliver(engine, "ordered", "waiting", upto=5)
    deliver(engine, "any.order", "dead", upto=2)

    numbers = found(settings)

    assert numbers("dovecote_lag_events") == 6
    assert numbers("dovecote_lag_seconds") > 0
    assert numbers("dovecote_blocked_aggregates", handler="ordered") == 2
    assert numbers("dovecote_deliveries", handler="ordered", state="waiting") == 5
    assert numbers("dovecote_deliveries", handler="any.order", state="dead") == 2
    assert numbers("dovecote_unprocessed_events", handler="any.order") == 4
    assert numbers("dovecote_oldest_unprocessed_seconds", handler="any.order") > 0


def test_a_pause_a_misplaced_row_and_a_type_without_a_route_are_reported(settings: Settings, engine: Engine) -> None:
    run(
        engine,
        "insert into dovecote.paused_handlers (handler_name, actor, reason, paused_at)"
        " values ('any.order', 'me', 'a test', now() - interval '2 days')",
    )
    run(
        engine,
        "insert into dovecote.unrouted_types (event_type, events, first_position, last_position)"
        " values ('shop.order_placed.v1', 7, 1, 9)",
    )
    run(
        engine,
        "insert into dovecote.processed_events (event_id, handler_name)"
        " values (dovecote.uuid_v7_lower_bound(now() - interval '9 years'), 'x')",
    )

    run(
        engine,
        "insert into dovecote.postponed (handler_name, after_position, since)"
        " values ('any.order', 0, now() - interval '1 hour')",
    )

    numbers = found(settings)

    assert numbers("dovecote_postponed_seconds", handler="any.order") == pytest.approx(3_600, abs=60)
    assert numbers("dovecote_paused_seconds", handler="any.order") == pytest.approx(172_800, abs=60)
    assert numbers("dovecote_paused_seconds", handler="ordered") == 0
    assert numbers("dovecote_unrouted_events") == 7
    assert numbers("dovecote_default_partition_in_use") == 1


def test_dead_messages_in_redis_are_counted(settings: Settings) -> None:
    client = connect_redis(settings.redis.url.get_secret_value(), 5)
    key = f"{settings.redis.namespace}:test.XQ"
    client.zadd(key, {"a": 1, "b": 2})
    try:
        assert found(settings)("dovecote_redis_dead_letters", queue="test") == 2
    finally:
        client.delete(key)
        client.close()


def test_headroom_ends_at_the_first_week_that_is_missing(settings: Settings, engine: Engine) -> None:
    run(
        engine,
        "do $$ begin execute 'drop table dovecote.outbox_'"
        " || dovecote.week_suffix(date_trunc('week', now(), 'UTC') + interval '2 weeks'); end $$",
    )

    assert 604_800 <= found(settings)("dovecote_partition_headroom_seconds") < 2 * 604_800


@pytest.mark.parametrize("away", ["postgres", "redis"])
def test_a_server_that_is_away_is_a_number_and_no_failure(settings: Settings, tmp_path: Path, away: str) -> None:
    urls = {"postgres": settings.database.url.get_secret_value(), "redis": settings.redis.url.get_secret_value()}
    urls[away] = {"postgres": "postgresql://me@127.0.0.1:1/x", "redis": "redis://127.0.0.1:1/0"}[away]

    numbers = found(settings_for(urls["postgres"], urls["redis"], tmp_path))

    (there,) = urls.keys() - {away}
    assert numbers.by("server", "dovecote_up") == {away: 0, there: 1}
    assert set(numbers.by("server", "dovecote_clock_skew_seconds")) == {there}
    assert ("dovecote_lag_events" in numbers.text) == (away == "redis")


def test_several_scrapers_ask_postgres_once(settings: Settings) -> None:
    registry = CollectorRegistry()
    system_collector = collector.SystemCollector(settings, ROUTES)
    registry.register(system_collector)
    statements: list[str] = []

    @event.listens_for(system_collector._engine, "after_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    numbers_in(registry)
    once = len(statements)
    for _ in range(5):
        numbers_in(registry)

    assert len(statements) == once
    assert 0 < once < 25
