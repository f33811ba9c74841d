"""Failures are found, retried and discarded; what waits behind them goes on in order, and the audit log has it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine, text

from domain.pricing import PriceQuoted
from dovecote import operations
from dovecote.errors import Refused
from dovecote.operations.deliveries import CannotChange, DeliverySelection, NotThere
from dovecote.operations.validation import NoReason
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.store.connections import connect
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.conftest import Servers
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import eventually
from tests.support.quotes import a_quote
from tests.support.system import System, system_for
from workers.gateways import Gateways

pytestmark = pytest.mark.servers

HANDLER = "test.note"


class Mood:
    """What the handler does with each price, until somebody mends it."""

    def __init__(self) -> None:
        self.broken: dict[int, Callable[[], Exception]] = {}

    def act(self, event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
        if error := self.broken.get(int(event.price)):
            raise error()
        note_as(HANDLER, event, uow)


@pytest.fixture
def mood() -> Mood:
    return Mood()


@pytest.fixture
def ordered(settings: Settings, mood: Mood) -> Iterator[System]:
    with system_for(settings, [a_route(HANDLER, mood.act, ordered=True, max_attempts=1)]) as system:
        make_room_for_effects(system.engine)
        yield system


def prices(system: System) -> list[int]:
    return [effect.price for effect in effects_in(system.engine)]


def actions(engine: Engine) -> list[tuple[str, str, int | None]]:
    return [(one.action, one.actor, one.affected) for one in operations.audit.list_audit_entries(engine).items]


def the_dead(system: System) -> list[operations.deliveries.Delivery]:
    return operations.deliveries.list_deliveries(system.engine, DeliverySelection(state="dead")).items


def test_a_mended_failure_is_found_retried_and_releases_what_waits_in_order(ordered: System, mood: Mood) -> None:
    mood.broken[2] = lambda: Refused("the account is closed")
    with ordered.running():
        write_quotes(ordered, [1, 2, 3, 4])
        eventually(lambda: ordered.status().handlers[HANDLER].waiting == 2, 20, "two that wait behind the second")

        (group,) = operations.deliveries.list_delivery_groups(ordered.engine, DeliverySelection()).groups
        (blocked,) = operations.aggregates.list_blocked_aggregates(ordered.engine, ordered.routes).items
        detail = operations.deliveries.get_delivery(ordered.engine, ordered.routes, HANDLER, group.example)
        mood.broken.clear()
        rehearsal = operations.deliveries.retry(
            ordered.engine, DeliverySelection(handler=HANDLER), actor="ada", dry_run=True
        )
        before = actions(ordered.engine)
        change = operations.deliveries.retry(
            ordered.engine, DeliverySelection(handler=HANDLER), actor="ada", reason="reopened"
        )
        ordered.until_quiet()

    assert (group.count, group.state, group.error_type) == (1, "dead", "Refused")
    assert group.error == "Refused: the account is closed"
    assert (blocked.event_id, blocked.state, blocked.waiting) == (group.example, "dead", 2)
    assert detail.waiting_behind == 2
    assert "Traceback" in (detail.traceback or "")
    assert (rehearsal.affected, [one.event_id for one in rehearsal.sample], before) == (1, [group.example], [])
    assert (change.affected, change.busy) == (1, 0)
    assert prices(ordered) == [1, 2, 3, 4]
    assert actions(ordered.engine) == [("deliveries.retry", "ada", 1)]


def test_a_discarded_failure_lets_those_behind_it_go_on_in_order(ordered: System, mood: Mood) -> None:
    mood.broken[1] = lambda: Refused("no")
    with ordered.running():
        write_quotes(ordered, [1, 2, 3, 4])
        eventually(lambda: ordered.status().handlers[HANDLER].waiting == 3, 20, "three that wait")
        (dead,) = the_dead(ordered)

        change = operations.deliveries.discard(
            ordered.engine, DeliverySelection(handler=HANDLER, event_id=dead.event_id), actor="ada", reason="test data"
        )
        ordered.until_quiet()

    assert (change.affected, change.released) == (1, 3)
    assert prices(ordered) == [2, 3, 4]
    assert ordered.status().handlers[HANDLER].discarded == 1
    (entry,) = operations.audit.list_audit_entries(ordered.engine, action="deliveries").items
    assert (entry.action, entry.reason, entry.affected) == ("deliveries.discard", "test data", 1)
    assert entry.details["filter"] == {"handler": HANDLER, "event_id": str(dead.event_id)}


def test_what_waits_is_neither_retried_nor_discarded_alone(ordered: System, mood: Mood) -> None:
    mood.broken[1] = lambda: Refused("no")
    with ordered.running():
        write_quotes(ordered, [1, 2])
        eventually(lambda: ordered.status().handlers[HANDLER].waiting == 1, 20, "one that waits")
    (waiting,) = operations.deliveries.list_deliveries(ordered.engine, DeliverySelection(state="waiting")).items
    one = DeliverySelection(handler=HANDLER, event_id=waiting.event_id)

    for verb in (operations.deliveries.retry, operations.deliveries.discard):
        with pytest.raises(CannotChange, match="waits behind an earlier event"):
            verb(ordered.engine, one, actor="ada", reason="why not")

    assert actions(ordered.engine) == []


def test_a_released_event_that_was_never_tried_is_not_discarded(ordered: System) -> None:
    """Or those behind it would pass the one before it."""
    with unit_of_work(ordered.sessions) as uow:
        uow.emit(a_quote("EUR", 1))
    never_tried(ordered.engine)

    change = operations.deliveries.discard(
        ordered.engine, DeliverySelection(state="retrying"), actor="ada", reason="why not"
    )

    assert change.affected == 0


def never_tried(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
                " event_type, state, next_attempt_at) select :handler, id, position, aggregate_type, aggregate_id,"
                " event_type, 'retrying', now() + interval '1 hour' from dovecote.outbox"
            ),
            {"handler": HANDLER},
        )


def test_a_single_one_that_is_not_there_is_named(ordered: System) -> None:
    with pytest.raises(NotThere, match="dovecote events show"):
        operations.deliveries.retry(
            ordered.engine, DeliverySelection(handler=HANDLER, event_id=UUID(int=7)), actor="ada"
        )


def test_a_discard_needs_a_reason(ordered: System) -> None:
    with pytest.raises(NoReason):
        operations.deliveries.discard(ordered.engine, DeliverySelection(), actor="ada", reason="  ")


# Many at once --------------------------------------------------------------------------------------


def some_dead(engine: Engine, count: int, fingerprints: Sequence[str] = ("aaa",), handler: str = HANDLER) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
                " event_type, state, attempts, error_type, error_fingerprint, error)"
                " select :handler, dovecote.uuid_v7(), n, 'price', 's' || n, 'pricing.price_quoted.v1', 'dead', 8,"
                " 'Refused', (cast(:fingerprints as text[]))[1 + n % cardinality(cast(:fingerprints as text[]))], 'no'"
                " from generate_series(1, :count) n"
            ),
            {"handler": handler, "count": count, "fingerprints": list(fingerprints)},
        )


@pytest.fixture
def own_engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url)
    yield engine
    engine.dispose()


def test_a_group_is_one_kind_and_the_rest_stays(own_engine: Engine) -> None:
    some_dead(own_engine, 30, ["aaa", "bbb", "ccc"])

    operations.deliveries.retry(own_engine, DeliverySelection(fingerprint="bbb"), actor="ada")

    assert {
        (group.fingerprint, group.count)
        for group in operations.deliveries.list_delivery_groups(own_engine, DeliverySelection()).groups
    } == {
        ("aaa", 10),
        ("ccc", 10),
    }
    again = operations.deliveries.list_deliveries(own_engine, DeliverySelection(state="retrying")).items
    assert {(one.fingerprint, one.attempts) for one in again} == {("bbb", 0)}


def test_a_large_change_is_made_in_pieces_each_with_its_audit_line(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovecote.operations.deliveries._BATCH", 40)
    some_dead(own_engine, 100)

    change = operations.deliveries.retry(own_engine, DeliverySelection(), actor="ada")

    assert change.affected == 100
    assert sorted(affected or 0 for _, _, affected in actions(own_engine)) == [20, 40, 40]


def test_a_failed_audit_line_takes_the_change_back(own_engine: Engine) -> None:
    some_dead(own_engine, 3)
    with own_engine.begin() as connection:
        connection.execute(text("alter table dovecote.audit_log add constraint nobody check (actor <> 'mallory')"))

    with pytest.raises(Exception, match="nobody"):
        operations.deliveries.retry(own_engine, DeliverySelection(), actor="mallory")

    assert operations.deliveries.list_delivery_groups(own_engine, DeliverySelection()).groups[0].count == 3


def test_a_group_leaves_alone_what_a_worker_is_trying(own_engine: Engine, fresh_database_url: str) -> None:
    some_dead(own_engine, 5)
    with psycopg.connect(fresh_database_url) as worker:
        worker.execute("select from dovecote.deliveries where position = 3 for update")

        change = operations.deliveries.discard(own_engine, DeliverySelection(), actor="ada", reason="test data")

        assert (change.affected, change.busy) == (4, 1)


def test_a_single_one_waits_for_the_worker_that_tries_it(own_engine: Engine, fresh_database_url: str) -> None:
    some_dead(own_engine, 1)
    (dead,) = operations.deliveries.list_deliveries(own_engine, DeliverySelection()).items
    outcome: list[Any] = []

    def discard() -> None:
        try:
            one = DeliverySelection(handler=HANDLER, event_id=dead.event_id)
            outcome.append(operations.deliveries.discard(own_engine, one, actor="ada", reason="test data"))
        except NotThere as error:
            outcome.append(error)

    with psycopg.connect(fresh_database_url) as worker:
        worker.execute("delete from dovecote.deliveries")
        operator = threading.Thread(target=discard)
        operator.start()
        eventually(lambda: waiting_for_a_lock(own_engine), 20, "an operator who waits for the worker")
        worker.commit()
    operator.join(20)

    assert isinstance(outcome[0], NotThere)
    assert actions(own_engine) == []


def waiting_for_a_lock(engine: Engine) -> bool:
    with engine.connect() as connection:
        return bool(
            connection.execute(
                text(
                    "select exists (select from pg_stat_activity where wait_event_type = 'Lock'"
                    " and datname = current_database())"
                )
            ).scalar_one()
        )


# Listing -------------------------------------------------------------------------------------------


def test_pages_of_deliveries_show_each_one_once(own_engine: Engine) -> None:
    some_dead(own_engine, 7)
    some_dead(own_engine, 7, handler="test.other")
    seen: list[tuple[int, str]] = []
    before: str | None = None

    while True:
        page = operations.deliveries.list_deliveries(own_engine, DeliverySelection(), limit=4, before=before)
        seen += [(one.position, one.handler) for one in page.items]
        before = page.next
        if before is None:
            break

    assert seen == sorted({(n, handler) for n in range(1, 8) for handler in (HANDLER, "test.other")}, reverse=True)


def test_pages_of_blocked_aggregates_show_each_one_once(ordered: System, mood: Mood) -> None:
    for price in (1, 2, 3):
        mood.broken[price] = lambda: Refused("no")
    with ordered.running():
        for price, symbol in ((1, "EUR"), (2, "USD"), (3, "GBP")):
            write_quotes(ordered, [price, 10, 11], symbol)
        eventually(lambda: ordered.status().handlers[HANDLER].waiting == 6, 20, "six that wait")
    first = operations.aggregates.list_blocked_aggregates(ordered.engine, ordered.routes, limit=2)

    second = operations.aggregates.list_blocked_aggregates(ordered.engine, ordered.routes, limit=2, after=first.next)

    assert [one.aggregate_id for one in (*first.items, *second.items)] == ["EUR", "GBP", "USD"]
    assert second.next is None


def test_an_error_is_listed_by_its_headline_without_its_traceback(own_engine: Engine) -> None:
    some_dead(own_engine, 1)
    headline = f"ProgrammingError: {'the market is closed ' * 20}"
    with own_engine.begin() as connection:
        stored = {"headline": headline, "error": f"Traceback (most recent call last):\n{headline}"}
        connection.execute(text("update dovecote.deliveries set headline = :headline, error = :error"), stored)

    (one,) = operations.deliveries.list_deliveries(own_engine, DeliverySelection()).items
    (kind,) = operations.deliveries.list_delivery_groups(own_engine, DeliverySelection()).groups

    assert (one.error, kind.error) == (headline[:300], headline[:300])


# Rights --------------------------------------------------------------------------------------------


@pytest.fixture
def operator_engine(servers: Servers, fresh_database_url: str) -> Iterator[Engine]:
    """A login that has the role dovecote_operator and nothing else."""
    with psycopg.connect(fresh_database_url, autocommit=True) as owner:
        owner.execute("drop role if exists night_shift")
        owner.execute("create role night_shift login password 'secret' in role dovecote_operator")
        url = connect(fresh_database_url).url.set(username="night_shift", password="secret")
        engine = connect(url.render_as_string(hide_password=False))
        yield engine
        engine.dispose()
        owner.execute("drop role night_shift")


def test_an_operator_needs_no_more_than_the_role(operator_engine: Engine, own_engine: Engine) -> None:
    some_dead(own_engine, 4)
    routes: Sequence[Route] = [a_route(HANDLER, ordered=True)]

    operations.status.get_status(operator_engine, routes)
    operations.aggregates.list_blocked_aggregates(operator_engine, routes)
    (newest, *_) = operations.deliveries.list_deliveries(operator_engine, DeliverySelection()).items
    operations.deliveries.get_delivery(operator_engine, routes, HANDLER, newest.event_id)
    operations.deliveries.retry(
        operator_engine, DeliverySelection(handler=HANDLER, event_id=newest.event_id), actor="ada"
    )
    operations.deliveries.discard(operator_engine, DeliverySelection(), actor="ada", reason="test data")

    assert [
        (one.action, one.actor, one.login) for one in operations.audit.list_audit_entries(operator_engine).items
    ] == [
        ("deliveries.discard", "ada", "night_shift"),
        ("deliveries.retry", "ada", "night_shift"),
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "update dovecote.audit_log set actor = 'nobody'",
        "delete from dovecote.audit_log",
        "truncate dovecote.audit_log",
        "insert into dovecote.audit_log (actor, action, login) values ('a', 'b', 'somebody else')",
        "insert into dovecote.audit_log (actor, action, at) values ('a', 'b', 'yesterday')",
    ],
)
def test_nobody_rewrites_the_audit_log(operator_engine: Engine, statement: str) -> None:
    with operator_engine.connect() as connection, pytest.raises(Exception, match="permission denied"):
        connection.execute(text(statement))
