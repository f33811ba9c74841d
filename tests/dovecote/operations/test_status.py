"""Status shows where everything is, and costs the same however long the history is."""

from collections.abc import Iterator
from importlib import import_module

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from dovecote import operations
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
from tests.support.exact_counts import count_everything
from tests.support.quotes import a_quote
from tests.support.scans import no_whole_table_is_read
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

HANDLER = "pricing.apply_quotes"


module = import_module("dovecote.operations.status")
counting = import_module("dovecote.operations.unprocessed")


@pytest.fixture
def own_engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url)
    yield engine
    engine.dispose()


def write(sessions: sessionmaker[Session], events: int) -> None:
    with unit_of_work(sessions) as uow:
        for price in range(1, events + 1):
            uow.emit(a_quote("EUR", price))


def run(engine: Engine, statement: str, **parameters: object) -> None:
    with engine.begin() as connection:
        connection.execute(text(statement), parameters)


def publish(engine: Engine, positions: str, events: int) -> None:
    run(
        engine,
        "insert into dovecote.published_batches (positions, events, epoch) values (cast(:p as int8multirange), :n, 1)",
        p=positions,
        n=events,
    )


def processed(engine: Engine, upto: int) -> None:
    run(
        engine,
        "insert into dovecote.processed_events (event_id, handler_name)"
        " select id, :handler from dovecote.outbox where position <= :upto",
        handler=HANDLER,
        upto=upto,
    )


def test_lag_is_what_lies_between_the_batches_above_the_checkpoint(own_engine: Engine) -> None:
    write(sessions_for(own_engine), 10)
    publish(own_engine, "{[3,5),[7,8)}", 3)
    run(own_engine, "update dovecote.relay_state set checkpoint = 2")

    relay = operations.status.get_status(own_engine, ROUTES).relay

    assert (relay.lag_events, relay.published, relay.at_least) == (5, 3, [])
    assert relay.lag_seconds > 0
    assert relay.published_per_second == round(3 / 60, 2)


def test_a_lag_too_long_to_count_says_so(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_UNPUBLISHED", 3)
    write(sessions_for(own_engine), 10)

    relay = operations.status.get_status(own_engine, ROUTES).relay

    assert (relay.lag_events, relay.at_least) == (6, ["lag_events"])


@pytest.mark.parametrize("position", [32_000, 2_147_483_000])
def test_positions_of_any_size_can_be_reckoned_with(own_engine: Engine, position: int) -> None:
    # psycopg sends an int as the smallest type it fits in; two of those must not be added as such.
    run(own_engine, "select setval('dovecote.outbox_position', :position)", position=position)
    run(own_engine, "update dovecote.relay_state set checkpoint = :position", position=position)

    relay = operations.status.get_status(own_engine, ROUTES).relay

    assert (relay.checkpoint, relay.lag_events) == (position, 0)


def test_unprocessed_is_what_no_handler_has_acted_on_or_given_up(own_engine: Engine) -> None:
    write(sessions_for(own_engine), 10)
    processed(own_engine, 6)
    run(
        own_engine,
        "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type,"
        " state, next_attempt_at) select :handler, id, position, aggregate_type, aggregate_id, event_type,"
        " case position when 7 then 'dead' else 'retrying' end, now() from dovecote.outbox where position in (7, 8)",
        handler=HANDLER,
    )

    handler = operations.status.get_status(own_engine, ROUTES).handlers[HANDLER]

    assert (handler.processed, handler.unprocessed, handler.retrying, handler.dead) == (6, 3, 1, 1)
    assert handler.at_least == []
    assert handler.processed_per_second > 0
    assert handler.oldest_unprocessed_seconds > 0


def test_a_handler_that_is_far_behind_is_not_counted_to_its_end(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_NEWEST_EVENTS", 20)
    write(sessions_for(own_engine), 50)
    processed(own_engine, 10)
    behind = operations.status.get_status(own_engine, ROUTES).handlers[HANDLER]
    run(own_engine, "delete from dovecote.processed_events")
    processed(own_engine, 45)

    nearly_done = operations.status.get_status(own_engine, ROUTES).handlers[HANDLER]

    assert (behind.unprocessed, behind.at_least) == (20, ["unprocessed"])
    assert (nearly_done.unprocessed, nearly_done.at_least) == (5, [])


def test_status_reads_no_table_from_end_to_end(own_engine: Engine) -> None:
    write(sessions_for(own_engine), 500)
    processed(own_engine, 400)
    publish(own_engine, "{[1,450)}", 449)
    run(own_engine, "update dovecote.relay_state set checkpoint = 449")

    with no_whole_table_is_read(own_engine):
        operations.status.get_status(own_engine, ROUTES)


def subscribe(engine: Engine, since: int = 0) -> None:
    """Subscribe all handlers, as a relay does when it first leads with them."""
    wanted = [(route.handler, kind) for route in ROUTES for kind in route.event_types]
    run(
        engine,
        "insert into dovecote.subscriptions (handler_name, event_type, since_position)"
        " select h, t, :since from unnest(cast(:handlers as text[]), cast(:types as text[])) as w (h, t)",
        since=since,
        handlers=[handler for handler, _ in wanted],
        types=[kind for _, kind in wanted],
    )


def move_low_water_marks(engine: Engine, upto: int) -> None:
    run(engine, "update dovecote.relay_state set checkpoint = :upto", upto=upto)
    run(engine, "select dovecote.move_low_water_marks(epoch, :upto) from dovecote.relay_state", upto=upto)


def behind_many_prices(engine: Engine) -> None:
    """300 codes that nobody sends, and after them 4,000 prices that are acted on."""
    run(
        engine,
        "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload, created_at)"
        " select 'challenge', n::text, 'verification.code_requested.v1', '{}', now() - interval '20 minutes'"
        " from generate_series(1, 300) n",
    )
    run(
        engine,
        "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)"
        " select 'price', 'EUR', 'pricing.price_quoted.v1', '{}' from generate_series(1, 4000)",
    )
    run(
        engine,
        "insert into dovecote.processed_events (event_id, handler_name)"
        " select id, :handler from dovecote.outbox where position > 300",
        handler=HANDLER,
    )


@pytest.mark.parametrize("are_examined", [False, True], ids=["not examined yet", "examined"])
def test_codes_that_nobody_sends_are_seen_behind_thousands_of_prices(own_engine: Engine, are_examined: bool) -> None:
    subscribe(own_engine)
    behind_many_prices(own_engine)
    if are_examined:
        move_low_water_marks(own_engine, 4_300)

    found = operations.status.get_status(own_engine, ROUTES).handlers

    codes, prices = found["verification.send_code"], found[HANDLER]
    assert (codes.unprocessed, codes.at_least) == (300, [])
    assert codes.oldest_unprocessed_seconds >= 1_200
    assert (prices.unprocessed, prices.at_least) == (0, [])


def test_a_paused_handler_s_backlog_is_counted(own_engine: Engine) -> None:
    subscribe(own_engine)
    behind_many_prices(own_engine)
    move_low_water_marks(own_engine, 4_300)
    operations.handlers.pause(own_engine, ROUTES, HANDLER, actor="me", reason="a test")
    write(sessions_for(own_engine), 2_500)
    move_low_water_marks(own_engine, 6_800)

    paused = operations.status.get_status(own_engine, ROUTES).handlers[HANDLER]

    assert (paused.unprocessed, paused.at_least) == (2_500, [])


def test_a_history_that_nobody_has_examined_yet_is_never_said_to_be_done(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_BOUND", 500)
    subscribe(own_engine)
    behind_many_prices(own_engine)
    write(sessions_for(own_engine), 10)
    run(own_engine, "delete from dovecote.outbox where position = 4305")  # a gap, as a rollback leaves one

    fresh = operations.status.get_status(own_engine, ROUTES).handlers[HANDLER]
    move_low_water_marks(own_engine, 4_310)
    examined = operations.status.get_status(own_engine, ROUTES).handlers[HANDLER]

    assert (fresh.unprocessed, fresh.at_least) == (9, ["unprocessed"])
    assert (examined.unprocessed, examined.at_least) == (9, [])


def test_status_counts_what_a_count_of_everything_finds(own_engine: Engine) -> None:
    subscribe(own_engine)
    write(sessions_for(own_engine), 20)
    processed(own_engine, 20)
    publish(own_engine, "{[1,21)}", 20)
    move_low_water_marks(own_engine, 20)
    write(sessions_for(own_engine), 5)

    counted = count_everything(own_engine, ROUTES)

    assert (counted.unprocessed[HANDLER], counted.processed[HANDLER], counted.is_quiet) == (5, 20, False)
    found = operations.status.get_status(own_engine, ROUTES).handlers
    assert {handler: one.unprocessed for handler, one in found.items()} == counted.unprocessed
