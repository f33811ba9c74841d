"""The use cases of billing against a real Postgres: state and event leave together, in order."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, OperationalError

from domain.billing import (
    Membership,
    Memberships,
    Status,
    Tier,
    WrongStatus,
    activate_membership,
    cancel_membership,
    change_tier,
    expire_membership,
    record_payment,
    record_refund,
    renew_membership,
    start_membership,
)
from domain.billing.repository import memberships
from dovecote.database import Sessions
from dovecote.errors import ConcurrentChange, InvalidEvent, NotFound
from dovecote.events.ids import uuid7
from dovecote.events.money import Money
from dovecote.outbox import outbox
from dovecote.unit_of_work import UnitOfWork, unit_of_work

pytestmark = pytest.mark.servers

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
IN_A_MONTH = NOON + timedelta(days=31)
IN_TWO_MONTHS = NOON + timedelta(days=61)
TEN_EUROS = Money(1_000, "EUR")


def a_stored_membership(sessions: Sessions, tier: Tier = Tier.MONTHLY, *, active: bool = False) -> UUID:
    with unit_of_work(sessions) as uow:
        membership_id = start_membership(uow, "user-1", tier, NOON).id
        if active:
            activate_membership(uow, membership_id, NOON, until=None if tier is Tier.FREE else IN_A_MONTH)
    return membership_id


def the_stored(sessions: Sessions, membership_id: UUID) -> Membership:
    with unit_of_work(sessions) as uow:
        return Memberships(uow).get(membership_id)


def events_of(sessions: Sessions, membership_id: UUID) -> list[tuple[str, dict[str, Any]]]:
    with sessions() as session:
        rows = session.execute(
            select(outbox.c.event_type, outbox.c.payload)
            .where(outbox.c.aggregate_type == "membership", outbox.c.aggregate_id == str(membership_id))
            .order_by(outbox.c.position)
        )
        return [(row.event_type, row.payload) for row in rows]


# Repository -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("status", Status)
def test_tier_and_status_come_back_as_what_they_were(sessions: Sessions, tier: Tier, status: Status) -> None:
    membership = Membership(id=uuid7(), user_id="user-1", tier=tier, status=status)
    if tier is not Tier.FREE:
        membership.current_period_start, membership.current_period_end = NOON, IN_A_MONTH
    with unit_of_work(sessions) as uow:
        Memberships(uow).add(membership)

    stored = the_stored(sessions, membership.id)

    assert stored is not membership
    assert stored.tier is tier
    assert stored.status is status


def test_every_field_comes_back(sessions: Sessions) -> None:
    with unit_of_work(sessions) as uow:
        membership = start_membership(
            uow,
            "user-Ω",
            Tier.ANNUAL,
            NOON,
            stripe_customer_id="cus_1",
            stripe_subscription_id=f"sub_{uuid7()}",
        )
        activate_membership(uow, membership.id, NOON, until=IN_A_MONTH)

    stored = the_stored(sessions, membership.id)

    for column in memberships.columns:
        assert getattr(stored, column.name) == getattr(membership, column.name), column.name
    assert stored.current_period_end == IN_A_MONTH


def test_tier_and_status_are_stored_as_their_words(sessions: Sessions) -> None:
    membership_id = a_stored_membership(sessions)

    with sessions() as session:
        words = session.execute(
            text("select tier, status from dovecote.memberships where id = :id"), {"id": membership_id}
        ).one()

    assert words == ("monthly", "pending")


def test_a_user_finds_all_memberships_oldest_first(sessions: Sessions) -> None:
    user_id = f"user-{uuid7()}"
    with unit_of_work(sessions) as uow:
        started = [start_membership(uow, user_id, tier, NOON).id for tier in Tier]

    with unit_of_work(sessions) as uow:
        found = {membership.id for membership in Memberships(uow).of_user(user_id)}

    assert found == set(started)


def test_two_memberships_cannot_share_a_stripe_subscription(sessions: Sessions) -> None:
    subscription_id = f"sub_{uuid7()}"
    with unit_of_work(sessions) as uow:
        start_membership(uow, "user-1", Tier.MONTHLY, NOON, stripe_subscription_id=subscription_id)

    with (
        pytest.raises(IntegrityError, match="memberships_one_per_stripe_subscription"),
        unit_of_work(sessions) as uow,
    ):
        start_membership(uow, "user-2", Tier.MONTHLY, NOON, stripe_subscription_id=subscription_id)


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("tier = 'gold'", "memberships_tier_is_known"),
        ("status = 'asleep'", "memberships_status_is_known"),
        ("current_period_start = null", "memberships_period_has_both_ends"),
        ("current_period_end = current_period_start", "memberships_period_ends_after_it_starts"),
        ("tier = 'free'", "memberships_free_tier_has_no_period"),
        (
            "current_period_start = null, current_period_end = null",
            "memberships_active_paid_tier_has_a_period",
        ),
    ],
)
def test_the_table_refuses_what_the_aggregate_would(sessions: Sessions, change: str, constraint: str) -> None:
    membership_id = a_stored_membership(sessions, active=True)

    with pytest.raises(IntegrityError, match=constraint), sessions.begin() as session:
        session.execute(text(f"update dovecote.memberships set {change} where id = :id"), {"id": membership_id})


def test_the_version_counts_changes(sessions: Sessions) -> None:
    membership_id = a_stored_membership(sessions)

    with unit_of_work(sessions) as uow:
        activate_membership(uow, membership_id, NOON, until=IN_A_MONTH)

    assert the_stored(sessions, membership_id).version == 2


def test_a_change_of_something_read_before_somebody_else_changed_it_is_refused(sessions: Sessions) -> None:
    user_id = f"user-{uuid7()}"
    with unit_of_work(sessions) as uow:
        membership_id = start_membership(uow, user_id, Tier.FREE, NOON).id

    def cancel_what_was_read_before() -> None:
        with unit_of_work(sessions) as uow:
            (membership,) = Memberships(uow).of_user(user_id)
            with unit_of_work(sessions) as other:
                activate_membership(other, membership_id, NOON)
            membership.cancel(NOON)

    with pytest.raises(ConcurrentChange):
        cancel_what_was_read_before()

    assert the_stored(sessions, membership_id).status is Status.ACTIVE


# Use cases --------------------------------------------------------------------------------------


def test_the_life_of_a_membership_is_recorded_in_order(sessions: Sessions) -> None:
    membership_id = a_stored_membership(sessions)
    steps: list[Callable[[UnitOfWork], None]] = [
        lambda uow: activate_membership(uow, membership_id, NOON, until=IN_A_MONTH),
        lambda uow: record_payment(uow, membership_id, TEN_EUROS, "in_1", "March", NOON),
        lambda uow: renew_membership(uow, membership_id, IN_TWO_MONTHS, IN_A_MONTH),
        lambda uow: change_tier(uow, membership_id, Tier.ANNUAL, IN_A_MONTH, until=IN_TWO_MONTHS),
        lambda uow: record_refund(uow, membership_id, TEN_EUROS, "in_1", "March", IN_A_MONTH),
        lambda uow: cancel_membership(uow, membership_id, IN_A_MONTH),
        lambda uow: expire_membership(uow, membership_id, IN_TWO_MONTHS),
    ]

    for step in steps:
        with unit_of_work(sessions) as uow:
            step(uow)

    assert [type_ for type_, _ in events_of(sessions, membership_id)] == [
        "billing.membership_started.v1",
        "billing.membership_activated.v1",
        "billing.payment_recorded.v1",
        "billing.membership_renewed.v1",
        "billing.tier_changed.v1",
        "billing.payment_refunded.v1",
        "billing.membership_cancelled.v2",
        "billing.membership_expired.v1",
    ]
    assert the_stored(sessions, membership_id).status is Status.EXPIRED


def test_a_whole_life_in_one_transaction_is_recorded_in_order_too(sessions: Sessions) -> None:
    with unit_of_work(sessions) as uow:
        membership_id = start_membership(uow, "user-1", Tier.FREE, NOON).id
        activate_membership(uow, membership_id, NOON)
        cancel_membership(uow, membership_id, NOON)
        expire_membership(uow, membership_id, NOON)

    assert [type_ for type_, _ in events_of(sessions, membership_id)] == [
        "billing.membership_started.v1",
        "billing.membership_activated.v1",
        "billing.membership_cancelled.v2",
        "billing.membership_expired.v1",
    ]
    assert the_stored(sessions, membership_id).status is Status.EXPIRED


def test_a_payment_is_recorded_with_its_money(sessions: Sessions) -> None:
    membership_id = a_stored_membership(sessions)

    with unit_of_work(sessions) as uow:
        record_payment(uow, membership_id, TEN_EUROS, "in_1", "March", NOON)

    _, payload = events_of(sessions, membership_id)[-1]
    assert payload["amount"] == {"amount_minor": 1_000, "currency": "EUR"}
    assert (payload["invoice_id"], payload["user_id"]) == ("in_1", "user-1")


def test_a_refused_use_case_leaves_neither_state_nor_event(sessions: Sessions) -> None:
    membership_id = a_stored_membership(sessions)

    def activate_renew_and_activate_again() -> None:
        with unit_of_work(sessions) as uow:
            activate_membership(uow, membership_id, NOON, until=IN_A_MONTH)
            renew_membership(uow, membership_id, IN_TWO_MONTHS, NOON)
            activate_membership(uow, membership_id, NOON, until=IN_A_MONTH)

    with pytest.raises(WrongStatus):
        activate_renew_and_activate_again()

    assert the_stored(sessions, membership_id).status is Status.PENDING
    assert len(events_of(sessions, membership_id)) == 1


def test_an_event_the_outbox_cannot_keep_is_refused_before_anything_is_written(sessions: Sessions) -> None:
    membership_id = a_stored_membership(sessions)

    with pytest.raises(InvalidEvent, match="NUL"), unit_of_work(sessions) as uow:
        record_payment(uow, membership_id, TEN_EUROS, "in_1", "March\x00", NOON)

    assert len(events_of(sessions, membership_id)) == 1


@pytest.mark.parametrize(
    "use_case",
    [
        lambda uow, nobody: activate_membership(uow, nobody, NOON),
        lambda uow, nobody: renew_membership(uow, nobody, IN_A_MONTH, NOON),
        lambda uow, nobody: change_tier(uow, nobody, Tier.FREE, NOON),
        lambda uow, nobody: cancel_membership(uow, nobody, NOON),
        lambda uow, nobody: expire_membership(uow, nobody, NOON),
        lambda uow, nobody: record_payment(uow, nobody, TEN_EUROS, "in_1", "March", NOON),
        lambda uow, nobody: record_refund(uow, nobody, TEN_EUROS, "in_1", "March", NOON),
    ],
)
def test_no_use_case_works_on_a_membership_that_is_not_there(
    sessions: Sessions, use_case: Callable[[UnitOfWork, UUID], None]
) -> None:
    nobody = uuid7()

    with pytest.raises(NotFound, match=str(nobody)), unit_of_work(sessions) as uow:
        use_case(uow, nobody)


@pytest.mark.parametrize("record", [record_payment, record_refund])
def test_money_locks_its_membership_until_the_end(
    sessions: Sessions, record: Callable[[UnitOfWork, UUID, Money, str, str, datetime], None]
) -> None:
    membership_id = a_stored_membership(sessions)

    with unit_of_work(sessions) as uow, sessions() as session:
        record(uow, membership_id, TEN_EUROS, "in_1", "March", NOON)
        session.execute(text("set local lock_timeout = '50ms'"))
        with pytest.raises(OperationalError, match="lock timeout"):
            record(UnitOfWork(session), membership_id, TEN_EUROS, "in_2", "April", NOON)

    assert [payload["invoice_id"] for _, payload in events_of(sessions, membership_id)[1:]] == ["in_1"]
