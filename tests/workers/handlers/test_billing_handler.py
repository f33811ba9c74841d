"""What follows from the events of billing."""

from datetime import UTC, datetime

import pytest

from domain.billing import History, PaymentRefunded
from dovecote.database import Sessions
from dovecote.events.ids import uuid7
from dovecote.events.money import Money
from dovecote.privacy import Keyring
from dovecote.unit_of_work import unit_of_work
from workers.gateways import ChallengeCache, ConsoleSms, Gateways
from workers.handlers.billing import write_history

pytestmark = pytest.mark.servers

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
GATEWAYS = Gateways(
    sms=ConsoleSms(),
    challenges=ChallengeCache(None, "test"),
    keys=Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32),
)


def test_a_refund_recorded_twice_is_one_line_of_history(sessions: Sessions) -> None:
    refunded = PaymentRefunded(
        membership_id=uuid7(),
        user_id="user-1",
        amount=Money(1_999, "EUR"),
        invoice_id="in_1",
        description="March",
        occurred_at=NOON,
    )

    for _ in range(2):
        with unit_of_work(sessions) as uow:
            write_history(refunded, uow, GATEWAYS)

    with unit_of_work(sessions) as uow:
        (line,) = History(uow).of(refunded.membership_id)
    assert line.amount == Money(-1_999, "EUR")
    assert (line.source_event_id, line.occurred_at) == (refunded.event_id, NOON)
