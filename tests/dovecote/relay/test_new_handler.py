"""Where a new handler begins: exactly with what was not published when the relay first led with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text

from dovecote.operations.replay_plans import ReplayRefused, Request
from dovecote.operations.replays import plan
from dovecote.route import Route
from dovecote.settings import Settings
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

OLD = a_route("test.old")
TYPE = "pricing.price_quoted.v1"


@contextmanager
def a_writer_that_dawdles(settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that has written the quote 77 of DAWDLER, and is open until the caller commits it."""
    with psycopg.connect(settings.database.url.get_secret_value()) as writer:
        writer.execute(
            "select dovecote.append_event('price', 'DAWDLER', event_type, payload || %s) from dovecote.outbox limit 1",
            ('{"symbol": "DAWDLER", "price": "77"}',),
        )
        yield writer


def one_value(system: System, query: str, **parameters: object) -> Any:
    with system.engine.connect() as connection:
        return connection.scalar(text(query), parameters)


def wipe(system: System) -> None:
    script = "for _, key in ipairs(redis.call('keys', ARGV[1])) do redis.call('del', key) end"
    system.broker.client.eval(script, 0, f"{system.settings.redis.namespace}:*")


def prices_of(system: System, handler: str) -> list[int]:
    return [one.price for one in effects_in(system.engine) if one.handler == handler]


@pytest.mark.parametrize("ordered", [False, True], ids=["any order", "ordered"])
def test_what_a_dawdling_writer_commits_is_the_new_handler_s_and_nothing_before(
    settings: Settings, ordered: bool
) -> None:
    new = a_route("test.new", queue="new", ordered=ordered)
    with system_for(settings, [OLD]) as system:
        make_room_for_effects(system.engine)
        with system.running():
            write_quotes(system, [1])
            system.until_quiet()
        with a_writer_that_dawdles(settings) as writer:
            with system.running():
                write_quotes(system, [2])
                eventually(lambda: prices_of(system, "test.old") == [1, 2], 10, "what was written beside it")
            with_new(settings, new, writer.commit)


def with_new(settings: Settings, new: Route, let_it_commit: Callable[[], None]) -> None:
    with system_for(settings, [OLD, new]) as system:
        client: Any = system.broker.client
        with system.relay():
            eventually(lambda: one_value(system, SUBSCRIBED) == "1 {[3,4)}", 10, "a subscription")
            let_it_commit()
            eventually(lambda: client.hlen(f"{settings.redis.namespace}:new.msgs") == 1, 10, "its message")
            assert system.status().handlers["test.new"].unprocessed == 1
            assert unprocessed_by(system, "test.new") == 1
            wipe(system)
            eventually(lambda: client.hlen(f"{settings.redis.namespace}:new.msgs") == 1, 10, "its message once more")
            with system.workers():
                system.until_quiet()

            assert prices_of(system, "test.new") == [77]
            assert prices_of(system, "test.old") == [1, 2, 77]
            assert system.status().handlers["test.new"].unprocessed == 0
            assert unprocessed_by(system, "test.new") == 0


SUBSCRIBED = """
    select since_position || ' ' || published_above::text from dovecote.subscriptions where handler_name = 'test.new'
"""


def unprocessed_by(system: System, handler: str) -> int:
    """How many events keep partitions from being dropped because this handler has not acted on them."""
    count: int = one_value(
        system,
        "select coalesce(sum(events), 0) from dovecote.partition_blockers('00000000-0000-0000-0000-000000000000',"
        " 'ffffffff-ffff-ffff-ffff-ffffffffffff') where handler_name = :handler and blocker = 'unprocessed'",
        handler=handler,
    )
    return count


@pytest.fixture
def beside_a_gap(settings: Settings) -> Iterator[System]:
    """Positions 1 to 5, in two aggregates by turns; test.new began when 1, 3 and 4 were published."""
    new = a_route("test.new", ordered=True)
    with system_for(settings, [new]) as system:
        write_quotes(system, [1], "EUR")
        write_quotes(system, [2], "DAWDLER")
        write_quotes(system, [3], "EUR")
        write_quotes(system, [4], "DAWDLER")
        write_quotes(system, [5], "EUR")
        write_quotes(system, [6], "DAWDLER")
        with system.engine.begin() as connection:
            connection.execute(
                text(
                    "insert into dovecote.subscriptions (handler_name, event_type, since_position, published_above)"
                    " values ('test.new', :type, 1, '{[3,5)}')"
                ),
                {"type": TYPE},
            )
        yield system


def blocker(system: System, symbol: str, before: int) -> int | None:
    found: UUID | None = one_value(
        system,
        "select dovecote.blocker('test.new', array[:type], 'price', :symbol, :before)",
        type=TYPE,
        symbol=symbol,
        before=before,
    )
    position: int | None = one_value(system, "select position from dovecote.outbox where id = :id", id=found)
    return position


def test_only_what_is_the_handler_s_is_waited_for(beside_a_gap: System) -> None:
    assert blocker(beside_a_gap, "EUR", 5) is None, "1 and 3 were published before its time"
    assert blocker(beside_a_gap, "DAWDLER", 4) == 2, "what turned up in a gap is its own"
    assert blocker(beside_a_gap, "DAWDLER", 6) == 2, "4 is not, so it is 2 that 6 waits for"


def test_a_replay_of_missing_events_says_where_its_order_begins(beside_a_gap: System) -> None:
    asked = Request(handler="test.new", mode="backfill", reason="a test", actor="me")

    with pytest.raises(ReplayRefused, match="--from-position 5"):
        plan(beside_a_gap.engine, beside_a_gap.routes, asked)


def test_a_new_version_of_an_event_begins_where_the_event_did(beside_a_gap: System) -> None:
    with beside_a_gap.engine.begin() as connection:
        connection.execute(text("update dovecote.subscriptions set event_type = 'pricing.price_quoted.v9'"))

    with beside_a_gap.relay():
        eventually(lambda: one_value(beside_a_gap, f"{SUBSCRIBED} and event_type = '{TYPE}'"), 10, "a subscription")

    assert one_value(beside_a_gap, f"{SUBSCRIBED} and event_type = '{TYPE}'") == "1 {[3,5)}"
