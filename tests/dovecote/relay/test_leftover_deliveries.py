"""Deliveries that nobody can send, of handlers without a route and of events that are gone, are in nobody's way.

And what is sent again because nothing was heard of it goes in the message it went in before.
"""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from domain.pricing import PriceQuoted
from dovecote import operations
from dovecote.errors import Refused
from dovecote.operations.deliveries import DeliverySelection
from dovecote.relay.bundler import Bundler
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.store import leases
from dovecote.unit_of_work import UnitOfWork
from tests.support.effects import a_route, effects_in, make_room_for_effects, note_as, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

NOTE, OTHER, GONE = "test.note", "test.other", "gone.handler"

DELIVER = """
    insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state,
        attempts, error_type, error, next_attempt_at)
    select :handler, id, position, aggregate_type, aggregate_id, event_type, :state, 1, 'UnknownHandler',
        'UnknownHandler: no route', case when :state = 'retrying' then now() - interval '1 hour' end
    from dovecote.outbox where position between :first and :last
"""


@pytest.fixture
def systems(settings: Settings) -> Iterator[Callable[..., System]]:
    opened: list[Any] = []

    def make(*routes: Route) -> System:
        context = system_for(settings, routes)
        system: System = context.__enter__()
        opened.append(context)
        if len(opened) == 1:
            make_room_for_effects(system.engine)
        return system

    yield make
    for context in reversed(opened):
        context.__exit__(None, None, None)


def run(system: System, statement: str, **parameters: object) -> Any:
    with system.engine.begin() as connection:
        return connection.execute(text(statement), parameters)


def deliver(system: System, handler: str, first: int, last: int, state: str = "retrying") -> None:
    run(system, DELIVER, handler=handler, state=state, first=first, last=last)


def deliveries(system: System) -> list[Any]:
    return list(run(system, "select handler_name, state, attempts from dovecote.deliveries order by 1, position"))


def lease(system: System, limit: int = 1_000, seconds: float = 60) -> list[leases.DueDelivery]:
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        return leases.lease_due(connection, limit, seconds, system.routes)


def end_leases(system: System, first: int, last: int) -> None:
    """As if their time were over."""
    run(
        system,
        "update dovecote.deliveries set next_attempt_at = now(), leased_until = now()"
        " where position between :first and :last",
        first=first,
        last=last,
    )


# Handlers without a route -------------------------------------------------------------------------


def test_rows_of_a_handler_without_a_route_are_left_alone_until_it_has_one(
    systems: Callable[..., System],
) -> None:
    system = systems(a_route())
    write_quotes(system, range(3))
    deliver(system, GONE, 1, 3)
    versions = "select event_id, xmin::text from dovecote.deliveries where handler_name = 'gone.handler' order by 1"
    before = list(run(system, versions))

    with system.running():
        system.until_quiet()
        eventually(lambda: len(effects_in(system.engine)) == 3, 10, "the live handler")
    assert list(run(system, versions)) == before

    # The code is back.
    again = systems(a_route(), a_route(GONE))
    with again.running():
        eventually(lambda: len(effects_in(system.engine)) == 6, 10, "what waited for it")
    assert deliveries(system) == []


def test_one_handlers_many_retries_do_not_keep_anothers_few_waiting(systems: Callable[..., System]) -> None:
    system = systems(a_route(), a_route(OTHER))
    write_quotes(system, range(100))
    deliver(system, NOTE, 1, 100)
    deliver(system, OTHER, 99, 100)

    due = lease(system, limit=10)

    assert [one.handler_name for one in due].count(OTHER) == 2
    assert len(due) == 10


# The same messages --------------------------------------------------------------------------------


def ids(system: System, due: list[leases.DueDelivery]) -> set[str]:
    return {message.id for message in Bundler(system.routes).retries(due)}


def test_what_is_sent_again_after_its_lease_goes_in_the_messages_it_went_in(systems: Callable[..., System]) -> None:
    system = systems(a_route(bundle_size=3))
    write_quotes(system, range(20))
    deliver(system, NOTE, 1, 8)
    first = ids(system, lease(system))
    deliver(system, NOTE, 9, 13)
    second = ids(system, lease(system))
    assert (len(first), len(second)) == (3, 2)

    deliver(system, NOTE, 14, 20)
    end_leases(system, 1, 13)
    third = ids(system, lease(system))
    assert third > first | second
    assert len(third) == 3 + 2 + 3

    # A new leader, or an empty Redis, ends them all.
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        assert leases.end_leases(connection) == 20
    assert ids(system, lease(system)) == third


def test_a_lease_lasts_as_long_as_nothing_was_heard_of_the_message(systems: Callable[..., System]) -> None:
    system = systems(a_route())
    write_quotes(system, [1])
    deliver(system, NOTE, 1, 1)
    left = "select extract(epoch from leased_until - now())::float8 from dovecote.deliveries"

    def expect(seconds: float) -> None:
        assert run(system, left).scalar_one() == pytest.approx(seconds, abs=25)

    lease(system)
    expect(60)
    for sent_seconds_ago, expected in ((30, 60), (300, 300), (100_000, 3_600)):
        run(system, f"update dovecote.deliveries set first_leased_at = now() - interval '{sent_seconds_ago} s'")
        end_leases(system, 1, 1)
        lease(system)
        expect(expected)
    # It was tried, and failed.
    run(system, "update dovecote.deliveries set next_attempt_at = now() - interval '1 s', updated_at = now()")
    lease(system)
    expect(60)


# Events that are gone -----------------------------------------------------------------------------


def test_a_delivery_whose_event_is_gone_is_dead_and_says_so(
    systems: Callable[..., System], capsys: pytest.CaptureFixture[str]
) -> None:
    system = systems(a_route())
    write_quotes(system, range(3))
    deliver(system, NOTE, 1, 3)
    gone = run(system, "delete from dovecote.outbox where position = 2 returning id").scalar_one()

    with system.running():
        eventually(lambda: len(effects_in(system.engine)) == 2, 10, "its neighbours")
        eventually(lambda: deliveries(system) == [(NOTE, "dead", 1)], 10, "the one without an event")

    logged = [line for line in capsys.readouterr().out.splitlines() if str(gone) in line]
    assert len(logged) == 1
    assert "is not in the outbox" in logged[0]
    assert NOTE in logged[0]
    detail = operations.deliveries.get_delivery(system.engine, system.routes, NOTE, gone)
    assert detail.delivery.error_type == "EventIsGone"
    assert "is not in dovecote.outbox any more" in (detail.traceback or "")
    # Asked to send it again, we say why not, and change nothing.
    with pytest.raises(operations.deliveries.CannotChange, match="not in the outbox any more"):
        operations.deliveries.retry(system.engine, DeliverySelection(handler=NOTE, event_id=gone), actor="ada")
    assert operations.deliveries.retry(system.engine, DeliverySelection(handler=NOTE), actor="ada").affected == 0
    assert deliveries(system) == [(NOTE, "dead", 1)]
    operations.deliveries.discard(
        system.engine, DeliverySelection(handler=NOTE, event_id=gone), actor="ada", reason="gone"
    )


@pytest.mark.parametrize("missing", [1, 3])
def test_what_waits_behind_an_event_that_is_gone_goes_on_in_order(
    systems: Callable[..., System], missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the net that looks at aggregates one after the other.
    monkeypatch.setattr(leases, "release_unblocked", lambda *_: 0)
    fails = {1}

    def act(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        if int(event.price) in fails:
            raise Refused("not yet")
        note_as(NOTE, event, uow)

    system = systems(a_route(function=act, ordered=True, bundle_size=2))
    write_quotes(system, range(1, 7))
    waiting = [(NOTE, "dead", 1), *[(NOTE, "waiting", 0)] * 5]
    with system.running():
        eventually(lambda: deliveries(system) == waiting, 10, "one is dead, the others wait")
    first = run(system, "select event_id from dovecote.deliveries where state = 'dead'").scalar_one()
    fails.clear()
    operations.deliveries.retry(system.engine, DeliverySelection(handler=NOTE, event_id=first), actor="ada")
    run(system, "delete from dovecote.outbox where position = :missing", missing=missing)

    with system.running():
        eventually(lambda: deliveries(system) == [(NOTE, "dead", 0)], 20, "all others acted on")

    assert [effect.price for effect in effects_in(system.engine)] == [n for n in range(1, 7) if n != missing]
