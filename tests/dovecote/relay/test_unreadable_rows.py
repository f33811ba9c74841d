"""A row that cannot be read is dead alone, with its reason: no relay ends, no neighbour waits, no consumer sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text

from dovecote.operations import replays
from dovecote.operations.deliveries import DeliverySelection as Failures
from dovecote.operations.deliveries import discard as discard_matching
from dovecote.operations.deliveries import retry
from dovecote.operations.replays import Request
from dovecote.route import Dovecote
from dovecote.store.replays import ReplaySelection
from tests.support.effects import a_route, effects_in, write_quotes
from tests.support.past_the_trigger import a_document, insert_past_the_trigger, numbers
from tests.support.processes import eventually
from tests.support.system import System

pytestmark = pytest.mark.servers

SystemWith = Callable[..., System]


def past_the_trigger(system: System, payload: str, **more: str) -> int:
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        return insert_past_the_trigger(connection, payload, **more)


def run(system: System, statement: str, *parameters: object) -> list[Any]:
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def letters(system: System) -> list[tuple[str, int, str, str, str]]:
    """Handler, position, state, kind and text of every delivery."""
    return run(
        system,
        "select handler_name, position, state, error_type, error from dovecote.deliveries order by 2, 1",
    )


def prices(system: System, symbol: str = "EUR") -> list[int]:
    return [effect.price for effect in effects_in(system.engine) if effect.symbol == symbol]


#: Name -> how such a row is put there, and the words that report it.
UNREADABLE: dict[str, tuple[Callable[[System], int], str]] = {
    # 2.6 kB in the column, 1.18 GB as text: Postgres cannot make it.
    "a text of more than a gigabyte": (lambda system: past_the_trigger(system, numbers(131071, 9_000)), "as text"),
    # Postgres can, Redis takes no more than 512 MB at once.
    "a text of half a gigabyte": (lambda system: past_the_trigger(system, numbers(131071, 4_200)), "as text"),
    "a small row of large numbers": (lambda system: past_the_trigger(system, numbers(131071, 20)), "2621"),
    "a document of two megabytes": (lambda system: past_the_trigger(system, a_document(2_000)), "1000000"),
    "headers of large numbers": (
        lambda system: past_the_trigger(
            system, "{}", headers=numbers(131071, 9_000).replace('"n"', '"correlation_id"')
        ),
        "headers",
    ),
    "a type that is no word": (
        lambda system: past_the_trigger(system, "{}", aggregate_type='pri"ce'),
        "aggregate_type",
    ),
    "a small value that was damaged on disk": (lambda system: damaged(system, "external", 3), "chunk number"),
    "a large value that was damaged on disk": (lambda system: damaged(system, "extended", 50), "chunk number"),
}


def damaged(system: System, storage: str, kilobytes: int) -> int:
    """Write an event whose payload lies outside of its row, in full, and take that away."""
    # Not compressed, so that the statement that reads the small ones falls over it.
    parts = run(
        system, "select inhrelid::regclass::text from pg_inherits where inhparent = 'dovecote.outbox'::regclass"
    )
    for (part,) in parts:
        run(system, f"alter table {part} alter payload set storage {storage}")
    position = past_the_trigger(system, a_document(kilobytes))
    ((part,),) = run(system, "select tableoid::regclass::text from dovecote.outbox where position = %s", position)
    ((oid, toast),) = run(
        system, "select reltoastrelid, reltoastrelid::regclass::text from pg_class where oid = %s::regclass", part
    )
    with psycopg.connect(system.settings.database.url.get_secret_value()) as connection:
        # Nobody may change a TOAST table, so it is an ordinary one for a short time.
        connection.execute("set allow_system_table_mods = on")
        connection.execute("update pg_class set relkind = 'r' where oid = %s", (oid,))
        connection.execute(sql.SQL("delete from {}").format(sql.Identifier(*toast.split("."))))
        connection.execute("update pg_class set relkind = 't' where oid = %s", (oid,))
    run(system, f"vacuum {part}")  # until then a chunk that was deleted is read all the same
    return position


@pytest.mark.parametrize("row", UNREADABLE)
def test_a_row_that_cannot_be_read_is_dead_alone_and_says_why(system_with: SystemWith, row: str) -> None:
    make, words = UNREADABLE[row]
    system = system_with(a_route("test.note"), a_route("test.other"))
    write_quotes(system, [1])
    bad = make(system)
    write_quotes(system, [2, 3])

    with system.running():
        eventually(lambda: len(prices(system)) == 6, 15, "the effects of its neighbours")
        status = system.until_quiet()

    found = letters(system)
    assert [(handler, position, state, kind) for handler, position, state, kind, _ in found] == [
        ("test.note", bad, "dead", "UnreadableRow"),
        ("test.other", bad, "dead", "UnreadableRow"),
    ]
    for *_, error in found:
        assert words in error
        assert "Discard it, or repair the row" in error
    assert status.relay.lag_events == 0
    ((checkpoint,),) = run(system, "select checkpoint from dovecote.relay_state")
    assert checkpoint == bad + 2
    assert status.relay.epoch == 1, "the relay has started over"


def test_it_is_dead_before_the_checkpoint_passes_it(system_with: SystemWith) -> None:
    system = system_with()
    bad = past_the_trigger(system, numbers(131071, 100))
    # A relay that could not write it down would have to stop before it.
    run(system, "revoke insert on dovecote.deliveries from dovecote_worker")
    run(
        system,
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no room'; end $$;"
        "create trigger refuse before insert on dovecote.deliveries for each row execute function refuse()",
    )

    with pytest.raises(psycopg.errors.RaiseException):
        relay_once(system)

    ((checkpoint, batches),) = run(
        system, "select checkpoint, (select count(*) from dovecote.published_batches) from dovecote.relay_state"
    )
    assert (checkpoint < bad, batches) == (True, 0)


def relay_once(system: System) -> None:
    """Run a relay in this thread, which ends with an error."""
    from dovecote.bootstrap import relay_for

    relay_for(system.settings, Dovecote(routes=system.routes)).run()


def test_where_no_handler_wants_it_it_is_passed_and_logged(
    system_with: SystemWith, capsys: pytest.CaptureFixture[str]
) -> None:
    system = system_with()
    bad = past_the_trigger(system, numbers(131071, 9_000), event_type="pricing.unwanted.v1")

    with system.relay():
        eventually(lambda: run(system, "select checkpoint from dovecote.relay_state") == [(bad,)], 10, "the checkpoint")

    assert letters(system) == []
    assert "an event cannot be read" in capsys.readouterr().out


def test_what_comes_after_it_waits_for_an_ordered_handler(system_with: SystemWith) -> None:
    system = system_with(a_route(ordered=True))
    bad = past_the_trigger(system, numbers(131071, 100), aggregate_id="EUR")
    write_quotes(system, [2])
    write_quotes(system, [3], symbol="USD")

    with system.running():
        eventually(lambda: prices(system, "USD") == [3], 15, "another aggregate")
        eventually(lambda: [letter[2] for letter in letters(system)] == ["dead", "waiting"], 15, "the one behind it")
        discard(system)
        eventually(lambda: prices(system) == [2], 15, "what waited, once it is discarded")

    assert [letter[1:3] for letter in letters(system)] == [(bad, "discarded")]


def discard(system: System) -> None:
    discard_matching(
        system.engine,
        Failures(handler="test.note"),
        actor="tester",
        reason="cannot be read",
        routes=system.routes,
    )


def test_a_retry_of_it_is_dead_again_and_holds_up_no_other_retry(system_with: SystemWith) -> None:
    system = system_with()
    bad = past_the_trigger(system, numbers(131071, 9_000))
    with system.relay():
        eventually(lambda: len(letters(system)) == 1, 10, "the dead letter")
    write_quotes(system, [1])
    run(
        system,
        """
        insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type,
            state, attempts, next_attempt_at)
        select 'test.note', id, position, aggregate_type, aggregate_id, event_type, 'retrying', 1, now()
        from dovecote.outbox where position > %s
        """,
        bad,
    )
    retry(system.engine, Failures(handler="test.note"), actor="tester", routes=system.routes)

    with system.running():
        eventually(lambda: prices(system) == [1], 15, "the other retry")
        eventually(lambda: [letter[1:4] for letter in letters(system)] == [(bad, "dead", "UnreadableRow")], 15, "dead")


def test_a_row_that_was_mended_is_acted_on_when_it_is_retried(system_with: SystemWith) -> None:
    system = system_with()
    past_the_trigger(system, numbers(131071, 9_000))
    with system.running():
        eventually(lambda: len(letters(system)) == 1, 10, "the dead letter")
        payload = (
            '{"symbol":"EUR","price":"7","as_of":"2026-11-20T12:00:00+00:00","occurred_at":"2026-11-20T12:00:00+00:00"}'
        )
        run(system, "update dovecote.outbox set payload = %s::jsonb", payload)

        retry(system.engine, Failures(handler="test.note"), actor="tester", routes=system.routes)

        eventually(lambda: prices(system) == [7], 15, "its effect")
    assert letters(system) == []


@pytest.mark.parametrize("mode", ["backfill", "reprocess"])
def test_a_replay_passes_it_and_comes_to_its_end(system_with: SystemWith, mode: str) -> None:
    system = system_with(a_route(replayable=True))
    write_quotes(system, [1, 2])
    with system.running():
        system.until_quiet()
    if mode == "backfill":
        run(system, "delete from dovecote.processed_events")
    # It was read and acted on once, and is damaged since.
    run(system, "update dovecote.outbox set payload = %s::jsonb where position = 1", numbers(131071, 9_000))
    asked: Any = {"mode": mode, "reason": "a test", "actor": "tester"}
    id = replays.start(
        system.engine, system.routes, Request(handler="test.note", filter=ReplaySelection(), **asked)
    ).replay_id
    assert id is not None

    with system.running():
        eventually(lambda: replays.get_replay(system.engine, id).is_over, 20, "the end of the replay")

    assert [letter[1:4] for letter in letters(system)] == [(1, "dead", "UnreadableRow")]
    assert prices(system) == [1, 2, 2]


def test_what_redis_had_lost_is_sent_again_past_it(system_with: SystemWith) -> None:
    system = system_with()
    write_quotes(system, [1, 2, 3])
    with system.relay():
        eventually(lambda: system.status().relay.lag_events == 0, 10, "the batch")
    run(system, "update dovecote.outbox set payload = %s::jsonb where position = 2", numbers(131071, 9_000))
    with system.engine.begin() as connection:
        connection.execute(text("update dovecote.relay_state set redis_run_id = null"))
    for key in system.broker.client.scan_iter(f"{system.settings.redis.namespace}:*"):
        system.broker.client.delete(key)

    with system.running():
        eventually(lambda: prices(system) == [1, 3], 15, "the others")

    assert [letter[1:4] for letter in letters(system)] == [(2, "dead", "UnreadableRow")]


def test_hundreds_of_them_are_all_recorded_as_unreadable(system_with: SystemWith) -> None:
    system = system_with()
    with psycopg.connect(system.settings.database.url.get_secret_value()) as connection:
        for _ in range(250):
            insert_past_the_trigger(connection, "{}", aggregate_type='pri"ce')
    write_quotes(system, [1])

    with system.running():
        eventually(lambda: prices(system) == [1], 60, "the event behind them")

    assert len(letters(system)) == 250
