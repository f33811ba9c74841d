"""The doctor reports an event that is committed and not published, and nothing that is as it should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import namedtuple_row

from dovecote.operations.doctor import progress
from tests.support.effects import a_route

pytestmark = pytest.mark.servers


@pytest.fixture
def connection(fresh_database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    monkeypatch.setattr(progress, "_SECOND_CHECK_SECONDS", 0.01)
    with psycopg.connect(fresh_database_url, autocommit=True, row_factory=namedtuple_row) as connection:
        yield connection


def write(connection: psycopg.Connection[Any], seconds_ago: int) -> Any:
    return connection.execute(
        """
        insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload, created_at)
        values ('price', 'EUR', 'pricing.price_quoted.v1', '{}', now() - make_interval(secs => %s))
        returning id, position
        """,
        (seconds_ago,),
    ).fetchone()


def publish(connection: psycopg.Connection[Any], positions: str) -> None:
    connection.execute(
        "insert into dovecote.published_batches (positions, events, epoch) values (%s, 1, 1)", (positions,)
    )


def test_an_old_event_that_is_not_published_is_named(connection: psycopg.Connection[Any]) -> None:
    write(connection, 500)
    stuck = write(connection, 400)
    write(connection, 1)
    publish(connection, "{[1,2)}")

    found = progress.relay(connection)

    assert found.level == "error"
    assert f"event {stuck.id} at position {stuck.position} is 40" in found.found


def test_gaps_of_open_transactions_and_young_events_are_as_they_should_be(connection: psycopg.Connection[Any]) -> None:
    write(connection, 500)
    connection.execute("select nextval('dovecote.outbox_position')")
    write(connection, 400)
    publish(connection, "{[1,2),[3,4)}")
    assert progress.relay(connection).level == "ok"

    write(connection, 5)

    assert progress.relay(connection).level == "ok"


def test_a_check_across_twenty_thousand_gaps_is_quick(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        """
        insert into dovecote.published_batches (positions, events, epoch)
        select int8multirange(int8range(2 * n, 2 * n + 1)), 1, 1 from generate_series(1, 20000) n
        """
    )
    connection.execute("select setval('dovecote.outbox_position', 40001)")
    connection.execute("set statement_timeout = '4s'")
    write(connection, 400)

    assert progress.relay(connection).level == "error"


def test_a_handler_that_stands_still_is_named_behind_any_number_of_younger_events(
    connection: psycopg.Connection[Any],
) -> None:
    connection.execute(
        "insert into dovecote.subscriptions (handler_name, event_type, since_position)"
        " values ('test.note', 'pricing.price_quoted.v1', 0)"
    )
    assert progress.handlers(connection, [a_route()]).found == "no handler has an event before it"
    for seconds_ago in (2_000, 1_000, 1):
        write(connection, seconds_ago)
    connection.execute(
        """
        insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)
        select 'price', 'EUR', 'nobody.wants_it.v1', '{}' from generate_series(1, 4000)
        """
    )

    found = progress.handlers(connection, [a_route()])

    assert found.level == "warning"
    assert found.found.startswith("test.note has 3 events before it, the oldest 2,00")
    connection.execute(
        "insert into dovecote.paused_handlers (handler_name, actor, reason) values ('test.note', 'me', 'a test')"
    )
    paused = progress.handlers(connection, [a_route()])
    assert (paused.level, "(paused)" in paused.found) == ("ok", True)
