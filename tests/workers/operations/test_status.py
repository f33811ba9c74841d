"""Status tells where everything is, and costs the same however long the history is."""

from collections.abc import Iterator
from importlib import import_module

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from domain.database import connect, sessions_for
from domain.unit_of_work import unit_of_work
from tests.quotes import a_quote
from tests.workers.operations.scans import no_whole_table_is_read
from workers import operations
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

HANDLER = "pricing.apply_quotes"

# `operations.status` is the verb; this is the module it lives in.
module = import_module("workers.operations.status")


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

    relay = operations.status(own_engine, ROUTES).relay

    assert (relay.lag_events, relay.published, relay.at_least) == (5, 3, [])
    assert relay.lag_seconds > 0
    assert relay.published_per_second == round(3 / 60, 2)


def test_a_lag_too_long_to_count_says_so(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_UNPUBLISHED", 3)
    write(sessions_for(own_engine), 10)

    relay = operations.status(own_engine, ROUTES).relay

    assert (relay.lag_events, relay.at_least) == (6, ["lag_events"])


@pytest.mark.parametrize("position", [32_000, 2_147_483_000])
def test_positions_of_any_size_can_be_reckoned_with(own_engine: Engine, position: int) -> None:
    # psycopg sends an int as the smallest type it fits in; two of those must not be added as such.
    run(own_engine, "select setval('dovecote.outbox_position', :position)", position=position)
    run(own_engine, "update dovecote.relay_state set checkpoint = :position", position=position)

    relay = operations.status(own_engine, ROUTES).relay

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

    handler = operations.status(own_engine, ROUTES).handlers[HANDLER]

    assert (handler.processed, handler.unprocessed, handler.retrying, handler.dead) == (6, 3, 1, 1)
    assert handler.at_least == []
    assert handler.processed_per_second > 0
    assert handler.oldest_unprocessed_seconds > 0


def test_a_handler_that_is_far_behind_is_not_counted_to_its_end(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NEWEST_EVENTS", 20)
    write(sessions_for(own_engine), 50)
    processed(own_engine, 10)
    behind = operations.status(own_engine, ROUTES).handlers[HANDLER]
    run(own_engine, "delete from dovecote.processed_events")
    processed(own_engine, 45)

    nearly_done = operations.status(own_engine, ROUTES).handlers[HANDLER]

    assert (behind.unprocessed, behind.at_least) == (20, ["unprocessed"])
    assert (nearly_done.unprocessed, nearly_done.at_least) == (5, [])


def test_status_reads_no_table_from_end_to_end(own_engine: Engine) -> None:
    write(sessions_for(own_engine), 500)
    processed(own_engine, 400)
    publish(own_engine, "{[1,450)}", 449)
    run(own_engine, "update dovecote.relay_state set checkpoint = 449")

    with no_whole_table_is_read(own_engine):
        operations.status(own_engine, ROUTES)


def test_exact_counts_see_an_event_that_status_does_not_look_at(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NEWEST_EVENTS", 5)
    write(sessions_for(own_engine), 20)
    processed(own_engine, 20)
    publish(own_engine, "{[1,21)}", 20)
    run(
        own_engine,
        "delete from dovecote.processed_events p using dovecote.outbox o where o.id = event_id and position = 2",
    )

    assert operations.status(own_engine, ROUTES).handlers[HANDLER].unprocessed == 0
    counted = operations.count_everything(own_engine, ROUTES)

    assert (counted.unprocessed[HANDLER], counted.processed[HANDLER], counted.is_quiet) == (1, 19, False)
