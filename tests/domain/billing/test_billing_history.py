"""The billing history: one line for each event, whatever is replayed."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from domain.billing import History, HistoryLine, PaymentRecorded, PaymentRefunded, line_for
from dovecote.database import Sessions
from dovecote.events.ids import uuid7
from dovecote.events.money import Money
from dovecote.unit_of_work import unit_of_work

pytestmark = pytest.mark.servers

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def a_line(membership_id: UUID, amount: Money | None = None, at: datetime = NOON) -> HistoryLine:
    return HistoryLine(
        membership_id=membership_id,
        user_id="user-1",
        event_type="billing.payment_recorded.v1",
        amount=amount,
        invoice_id="in_1" if amount else None,
        description="March",
        occurred_at=at,
        source_event_id=uuid7(),
    )


def history_of(sessions: Sessions, membership_id: UUID) -> list[HistoryLine]:
    with unit_of_work(sessions) as uow:
        return History(uow).of(membership_id)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    amount=st.none() | st.builds(Money, st.integers(-(2**63) + 1, 2**63 - 1), st.sampled_from(["EUR", "JPY", "USD"]))
)
def test_a_line_comes_back_as_it_was_written(sessions: Sessions, amount: Money | None) -> None:
    line = a_line(uuid7(), amount)

    with unit_of_work(sessions) as uow:
        History(uow).write(line)

    assert history_of(sessions, line.membership_id) == [line]


def test_an_event_recorded_twice_is_one_line(sessions: Sessions) -> None:
    paid = PaymentRecorded(
        membership_id=uuid7(),
        user_id="user-1",
        amount=Money(1_000, "EUR"),
        invoice_id="in_1",
        description="March",
        occurred_at=NOON,
    )

    for _ in range(2):
        with unit_of_work(sessions) as uow:
            History(uow).write(line_for(paid))
            History(uow).write(line_for(paid))

    assert len(history_of(sessions, paid.membership_id)) == 1


def test_what_was_paid_and_paid_back_adds_up_to_nothing(sessions: Sessions) -> None:
    membership_id = uuid7()
    with unit_of_work(sessions) as uow:
        for event_class in (PaymentRecorded, PaymentRefunded):
            History(uow).write(
                line_for(
                    event_class(
                        membership_id=membership_id,
                        user_id="user-1",
                        amount=Money(1_999, "EUR"),
                        invoice_id="in_1",
                        description="March",
                        occurred_at=NOON,
                    )
                )
            )

    with sessions() as session:
        total = session.scalar(
            text("select sum(amount_minor) from dovecote.billing_history where membership_id = :id"),
            {"id": membership_id},
        )

    assert total == 0


def test_lines_are_read_in_the_order_things_happened(sessions: Sessions) -> None:
    membership_id = uuid7()
    times = [NOON + timedelta(minutes=minutes) for minutes in (3, 1, 2)]

    with unit_of_work(sessions) as uow:
        for time in times:
            History(uow).write(a_line(membership_id, at=time))

    assert [line.occurred_at for line in history_of(sessions, membership_id)] == sorted(times)


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("currency = null", "billing_history_amount_has_a_currency"),
        ("currency = 'eur'", "billing_history_currency_is_three_capitals"),
    ],
)
def test_an_amount_without_its_currency_is_refused(sessions: Sessions, change: str, constraint: str) -> None:
    line = a_line(uuid7(), Money(1_000, "EUR"))
    with unit_of_work(sessions) as uow:
        History(uow).write(line)

    with pytest.raises(IntegrityError, match=constraint), sessions.begin() as session:
        session.execute(
            text(f"update dovecote.billing_history set {change} where source_event_id = :id"),
            {"id": line.source_event_id},
        )


@pytest.mark.parametrize(
    "statement", ["update dovecote.billing_history set description = ''", "delete from dovecote.billing_history"]
)
def test_a_worker_cannot_change_what_was_written(sessions: Sessions, statement: str) -> None:
    with sessions() as session:
        session.execute(text("set local role dovecote_worker"))
        with pytest.raises(ProgrammingError, match="permission denied"):
            session.execute(text(statement))


def test_a_worker_may_write_and_an_operator_read(sessions: Sessions) -> None:
    line = a_line(uuid7())

    with unit_of_work(sessions) as uow:
        uow.session.execute(text("set local role dovecote_worker"))
        History(uow).write(line)
    with unit_of_work(sessions) as uow:
        uow.session.execute(text("set local role dovecote_operator"))
        seen = History(uow).of(line.membership_id)

    assert seen == [line]
