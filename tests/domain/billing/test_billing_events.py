"""The events of billing as they are written and read: old examples stay readable for ever."""

import json
import typing
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.billing import BillingEvent, PaymentRecorded, PaymentRefunded, line_for
from dovecote.errors import InvalidValue
from dovecote.events import Event, read_event
from dovecote.events.ids import uuid7
from dovecote.events.money import Money

EXAMPLES = Path(__file__).parents[2] / "contracts" / "examples"
BILLING_EVENTS: tuple[type[Event], ...] = typing.get_args(BillingEvent)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

money = st.builds(
    Money,
    st.integers(1, 2**63 - 1),
    st.text(st.characters(min_codepoint=65, max_codepoint=90), min_size=3, max_size=3),
)


@pytest.mark.parametrize("event_class", BILLING_EVENTS, ids=lambda event_class: event_class.type)
def test_the_stored_example_is_what_we_read_and_write(event_class: type[Event]) -> None:
    stored = json.loads((EXAMPLES / f"{event_class.type}.json").read_text())

    event = read_event(event_class.type, uuid7(), stored)

    assert isinstance(event, event_class)
    assert event.payload() == stored
    assert (event.aggregate_type, event.aggregate_id) == ("membership", stored["membership_id"])


@given(amount=money, description=st.text(), event_class=st.sampled_from([PaymentRecorded, PaymentRefunded]))
def test_money_survives_the_way_through_the_payload(
    amount: Money, description: str, event_class: type[PaymentRecorded | PaymentRefunded]
) -> None:
    event = event_class(
        membership_id=uuid7(),
        user_id="user-1",
        amount=amount,
        invoice_id="in_1",
        description=description,
        occurred_at=NOON,
    )

    assert read_event(event.type, event.event_id, json.loads(json.dumps(event.payload()))) == event


@given(amount=money)
def test_a_refund_is_positive_as_an_event_and_negative_in_the_history(amount: Money) -> None:
    refunded = PaymentRefunded(
        membership_id=uuid7(),
        user_id="user-1",
        amount=amount,
        invoice_id="in_1",
        description="March",
        occurred_at=NOON,
    )

    assert refunded.payload()["amount"]["amount_minor"] > 0
    assert line_for(refunded).amount == -amount


@pytest.mark.parametrize(
    ("type_", "description"),
    [
        ("billing.membership_started.v1", "Started on the monthly tier"),
        ("billing.membership_activated.v1", "Activated on the monthly tier until 2026-04-01"),
        ("billing.membership_renewed.v1", "Renewed on the monthly tier until 2026-05-01"),
        ("billing.tier_changed.v1", "Moved from monthly to annual until 2027-03-15"),
        ("billing.membership_cancelled.v1", "Cancelled, runs until 2026-04-01"),
        ("billing.membership_cancelled.v2", "Cancelled, runs until 2026-04-01"),
        ("billing.membership_expired.v1", "Expired"),
        ("billing.payment_recorded.v1", "Monthly membership, March 2026"),
        ("billing.payment_refunded.v1", "Monthly membership, March 2026"),
    ],
)
def test_every_event_has_a_line_in_words(type_: str, description: str) -> None:
    event_id = uuid7()
    event = read_event(type_, event_id, json.loads((EXAMPLES / f"{type_}.json").read_text()))

    line = line_for(typing.cast(BillingEvent, event))

    assert line.description == description
    assert (line.event_type, line.source_event_id) == (event.type, event_id)
    assert line.membership_id == UUID("019cb0a1-7c00-7000-8000-000000000001")


def test_money_without_a_currency_is_no_money() -> None:
    with pytest.raises(InvalidValue):
        Money(1_000, "")
