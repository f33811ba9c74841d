"""Events are listed by page, shown with their whole life, and followed as they commit."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Engine, text

from domain.pricing import PriceQuoted
from dovecote import operations
from dovecote.errors import Refused
from dovecote.operations.events import EventSelection, NoSuchEvent
from dovecote.settings import Settings
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.dovecote.cli.test_cli import environment
from tests.support.effects import a_route, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.quotes import a_quote
from tests.support.scans import no_whole_table_is_read
from tests.support.system import system_for
from workers.gateways import Gateways
from workers.routes import ROUTES

pytestmark = pytest.mark.servers


module = import_module("dovecote.operations.events")

QUOTED = "pricing.price_quoted.v1"


@pytest.fixture
def own_engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url)
    yield engine
    engine.dispose()


def write(engine: Engine, *prices: int, symbol: str = "EUR") -> None:
    with unit_of_work(sessions_for(engine)) as uow:
        for price in prices:
            uow.emit(a_quote(symbol, price))


def foreign(engine: Engine, event_type: str = "shop.order_placed.v1", payload: str = "{}") -> UUID:
    with engine.begin() as connection:
        found = connection.execute(
            text("select dovecote.append_event('order', '4711', :type, cast(:payload as jsonb))"),
            {"type": event_type, "payload": payload},
        )
        return UUID(str(found.scalar_one()))


@pytest.mark.parametrize("wanted", [EventSelection(), EventSelection(aggregate_type="price", aggregate_id="EUR")])
def test_pages_show_each_event_once_in_both_directions(own_engine: Engine, wanted: EventSelection) -> None:
    for price in range(1, 12):
        write(own_engine, price)
    everything = [one.id for one in operations.events.list_events(own_engine, ROUTES, wanted).events]

    backwards: list[UUID] = []
    before: UUID | None = None
    while True:
        page = operations.events.list_events(own_engine, ROUTES, wanted, limit=4, before=before)
        backwards += [one.id for one in page.events]
        before = page.before
        if before is None:
            break
    newer = operations.events.list_events(own_engine, ROUTES, wanted, limit=4, after=everything[-1])

    assert len(everything) == 11
    assert backwards == everything
    assert [one.id for one in newer.events] == everything[-5:-1]


def test_filters_leave_what_matches(own_engine: Engine) -> None:
    write(own_engine, 1, 2)
    write(own_engine, 3, symbol="USD")
    order = foreign(own_engine)

    def found(**wanted: Any) -> list[str]:
        return [
            one.aggregate_id
            for one in operations.events.list_events(own_engine, ROUTES, EventSelection(**wanted)).events
        ]

    assert found(event_type=QUOTED) == ["USD", "EUR", "EUR"]
    assert found(aggregate_type="order") == ["4711"]
    assert found(aggregate_type="price", aggregate_id="USD") == ["USD"]
    at = operations.events.get_event(own_engine, ROUTES, order).created_at
    assert (
        operations.events.list_events(own_engine, ROUTES, EventSelection(until=at.replace(year=at.year - 1))).events
        == []
    )
    assert (
        len(
            operations.events.list_events(own_engine, ROUTES, EventSelection(since=at.replace(year=at.year - 1))).events
        )
        == 4
    )


def test_a_rare_type_is_searched_piece_by_piece(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LOOKED_AT", 5)
    order = foreign(own_engine)
    write(own_engine, *range(1, 9))
    wanted = EventSelection(event_type="shop.order_placed.v1")

    first = operations.events.list_events(own_engine, ROUTES, wanted)
    second = operations.events.list_events(own_engine, ROUTES, wanted, before=first.before)

    assert (first.events, first.looked_back_to is not None) == ([], True)
    assert ([one.id for one in second.events], second.before, second.looked_back_to) == ([order], None, None)


def test_an_event_is_shown_with_its_whole_life(settings: Settings) -> None:
    def refuse(event: PriceQuoted, uow: UnitOfWork, gateways: Gateways) -> None:
        raise Refused("no such market")

    routes = [a_route("test.note"), a_route("test.refuse", refuse)]
    with system_for(settings, routes) as system:
        make_room_for_effects(system.engine)
        with system.running():
            write_quotes(system, [1])
            system.until_quiet()
        (line,) = operations.events.list_events(system.engine, routes, EventSelection()).events

        life = operations.events.get_event(system.engine, routes, line.id)

    assert line.handlers == {"test.note": "processed", "test.refuse": "dead"}
    assert life.published_at is not None
    assert life.batch_events == 1
    note, refused = life.handlers
    assert (note.handler, note.state, note.processed_at is not None) == ("test.note", "processed", True)
    assert (refused.handler, refused.state, refused.attempts) == ("test.refuse", "dead", 1)
    assert "no such market" in (refused.error or "")


def test_a_phone_number_in_a_foreign_payload_is_masked(own_engine: Engine) -> None:
    order = foreign(own_engine, payload='{"phone": "+12015550123"}')

    assert operations.events.get_event(own_engine, ROUTES, order).payload == {"phone": "+***23"}


def test_an_unknown_event_is_named(own_engine: Engine) -> None:
    with pytest.raises(NoSuchEvent, match="never committed"):
        operations.events.get_event(own_engine, ROUTES, UUID("01900000-0000-7000-8000-000000000000"))


def test_no_listing_reads_the_outbox_from_end_to_end(own_engine: Engine) -> None:
    write(own_engine, *range(1, 300))
    order = foreign(own_engine)

    with no_whole_table_is_read(own_engine):
        operations.events.list_events(own_engine, ROUTES, EventSelection())
        operations.events.list_events(own_engine, ROUTES, EventSelection(event_type=QUOTED))
        operations.events.list_events(own_engine, ROUTES, EventSelection(aggregate_type="price", aggregate_id="EUR"))
        operations.events.get_event(own_engine, ROUTES, order)
        operations.aggregates.list_blocked_aggregates(own_engine, ROUTES)
        operations.deliveries.list_deliveries(own_engine, operations.deliveries.DeliverySelection())
        operations.deliveries.list_delivery_groups(own_engine, operations.deliveries.DeliverySelection())


@pytest.mark.once
def test_tail_shows_what_commits_even_out_of_order_and_ends_well_on_ctrl_c(
    tmp_path: Path, own_engine: Engine, fresh_database_url: str
) -> None:
    append = "select dovecote.append_event('order', %s, 'shop.order_placed.v1', '{}')"
    with (
        subprocess.Popen(
            [sys.executable, "-m", "dovecote", "events", "tail", "--json"],
            env=environment(tmp_path, {"DATABASE_URL": fresh_database_url}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as tail,
        psycopg.connect(fresh_database_url) as slow,
    ):
        assert tail.stdout
        assert tail.stderr
        eventually(lambda: is_tailed(own_engine), 30, "a tail that looks")
        slow.execute(append, ("slow",))
        with psycopg.connect(fresh_database_url) as quick:
            quick.execute(append, ("quick",))
        first = json.loads(tail.stdout.readline())
        slow.commit()
        second = json.loads(tail.stdout.readline())
        tail.send_signal(signal.SIGINT)
        code, complaints = tail.wait(30), tail.stderr.read()

    assert (first["aggregate_id"], second["aggregate_id"]) == ("quick", "slow")
    assert first["position"] > second["position"]
    assert (code, complaints) == (0, "")


def is_tailed(engine: Engine) -> bool:
    query = (
        "select exists (select from pg_stat_activity where application_name = 'dovecote events tail'"
        " and query ~ 'low_watermark|from dovecote.outbox' and datname = current_database())"
    )
    with engine.connect() as connection:
        return bool(connection.execute(text(query)).scalar_one())
