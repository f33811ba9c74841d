"""A field marked as sensitive leaves encrypted and is opened by the consumer."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from sqlalchemy import text

from dovecote.errors import InvalidEvent
from dovecote.events import Event, read_event, sensitive
from dovecote.events.ids import uuid7
from dovecote.privacy import CannotDecrypt, Keyring
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.processes import eventually
from tests.support.system import System, system_for
from workers.gateways import Gateways

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)
OTHER_KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"x" * 32}, current="k1", code_key=b"c" * 32)


@dataclass(frozen=True, kw_only=True)
class SalaryAgreed(Event, type="tests.salary_agreed.v1", aggregate="contract", key="contract_id"):
    contract_id: str
    salary: Decimal = sensitive()


def agreed() -> SalaryAgreed:
    return SalaryAgreed(contract_id="c-1", salary=Decimal("4711.50"), occurred_at=NOON)


def test_a_sensitive_field_comes_back_through_the_keys() -> None:
    event = agreed()

    payload = event.payload(KEYS)

    assert "4711" not in str(payload)
    assert "4711" not in repr(event)
    assert payload["contract_id"] == "c-1"
    assert read_event(event.type, event.event_id, payload, KEYS) == event


def test_without_keys_it_is_neither_written_nor_read() -> None:
    event = agreed()

    with pytest.raises(InvalidEvent, match="give the unit of work its keys"):
        event.payload()
    with pytest.raises(InvalidEvent, match="no keys to decrypt it"):
        read_event(event.type, event.event_id, event.payload(KEYS))


def test_with_another_key_or_in_another_event_it_does_not_open() -> None:
    event = agreed()
    payload = event.payload(KEYS)

    with pytest.raises(CannotDecrypt):
        read_event(event.type, event.event_id, payload, OTHER_KEYS)
    with pytest.raises(CannotDecrypt):
        read_event(event.type, uuid7(), payload, KEYS)


def test_a_sensitive_field_that_came_in_the_clear_is_refused_without_repeating_it() -> None:
    event = agreed()

    with pytest.raises(InvalidEvent, match="is not encrypted") as refusal:
        read_event(event.type, event.event_id, {**event.payload(KEYS), "salary": "4711.50"}, KEYS)

    assert "4711" not in str(refusal.value)


SEEN: list[Event] = []


def _see(event: Event, _uow: UnitOfWork, _gateways: Gateways) -> None:
    SEEN.append(event)


ROUTE = Route(handler="tests.see", events=(SalaryAgreed,), function=_see, queue="tests")


@pytest.fixture
def system(settings: Settings) -> Iterator[System]:
    SEEN.clear()
    with system_for(settings, [ROUTE]) as system, system.running():
        yield system


@pytest.mark.servers
def test_a_consumer_gets_it_decrypted_and_the_outbox_holds_it_encrypted(system: System) -> None:
    event = agreed()

    with unit_of_work(system.sessions, keys=system.gateways.keys) as uow:
        uow.emit(event)

    eventually(lambda: [event] == SEEN, 10, "the event at its consumer")
    with system.sessions() as session:
        stored = session.execute(text("select payload::text from dovecote.outbox")).scalar_one()
    assert "encrypted" in stored
    assert "4711" not in stored
