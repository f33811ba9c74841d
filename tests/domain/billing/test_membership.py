"""What may happen to a membership, and what is refused. No database."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.billing import (
    FreeTierHasNoPeriod,
    Membership,
    SameTier,
    Status,
    StillRunning,
    Tier,
    WrongStatus,
)
from dovecote.errors import DomainError, InvalidValue
from dovecote.events.money import Money

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
IN_A_MONTH = NOON + timedelta(days=31)
IN_TWO_MONTHS = NOON + timedelta(days=61)
IN_A_YEAR = NOON + timedelta(days=365)
TEN_EUROS = Money(1_000, "EUR")


def a_pending(tier: Tier = Tier.MONTHLY) -> Membership:
    return Membership.start("user-1", tier, NOON)[0]


def an_active(tier: Tier = Tier.MONTHLY) -> Membership:
    membership = a_pending(tier)
    membership.activate(NOON, None if tier is Tier.FREE else IN_A_MONTH)
    return membership


def a_cancelled(tier: Tier = Tier.MONTHLY) -> Membership:
    membership = an_active(tier)
    membership.cancel(NOON)
    return membership


def an_expired() -> Membership:
    membership = a_cancelled()
    membership.expire(IN_A_MONTH)
    return membership


# The life -------------------------------------------------------------------------------------


def test_a_membership_starts_pending_and_does_not_run() -> None:
    membership, started = Membership.start("user-1", Tier.ANNUAL, NOON)

    assert (membership.status, membership.tier) == (Status.PENDING, Tier.ANNUAL)
    assert not membership.is_running(NOON)
    assert (started.membership_id, started.user_id, started.tier) == (membership.id, "user-1", Tier.ANNUAL)
    assert started.occurred_at == NOON


@pytest.mark.parametrize("user_id", ["", "  ", "user\n1", "user\x001", "\ud800"])
def test_a_membership_needs_a_user(user_id: str) -> None:
    with pytest.raises(InvalidValue, match="user_id"):
        Membership.start(user_id, Tier.FREE, NOON)


def test_a_paid_membership_is_activated_for_a_period() -> None:
    membership = a_pending(Tier.MONTHLY)

    activated = membership.activate(NOON, IN_A_MONTH)

    assert membership.status is Status.ACTIVE
    assert (membership.current_period_start, membership.current_period_end) == (NOON, IN_A_MONTH)
    assert (activated.period_start, activated.period_end) == (NOON, IN_A_MONTH)


def test_a_free_membership_is_activated_without_a_period() -> None:
    membership = a_pending(Tier.FREE)

    activated = membership.activate(NOON)

    assert membership.is_running(IN_A_YEAR)
    assert (activated.period_start, activated.period_end) == (None, None)


def test_a_renewal_follows_without_a_gap() -> None:
    membership = an_active()

    renewed = membership.renew(IN_TWO_MONTHS, at=IN_A_MONTH + timedelta(hours=3))

    assert (renewed.period_start, renewed.period_end) == (IN_A_MONTH, IN_TWO_MONTHS)
    assert (membership.current_period_start, membership.current_period_end) == (IN_A_MONTH, IN_TWO_MONTHS)


def test_the_same_renewal_is_refused_the_second_time() -> None:
    membership = an_active()
    membership.renew(IN_TWO_MONTHS, NOON)

    with pytest.raises(InvalidValue, match="ends after it starts"):
        membership.renew(IN_TWO_MONTHS, NOON)


def test_a_change_of_tier_begins_a_period_of_its_own() -> None:
    membership = an_active(Tier.MONTHLY)
    later = NOON + timedelta(days=3)

    changed = membership.change_tier(Tier.ANNUAL, later, IN_A_YEAR)

    assert membership.tier is Tier.ANNUAL
    assert (membership.current_period_start, membership.current_period_end) == (later, IN_A_YEAR)
    assert (changed.previous_tier, changed.tier) == (Tier.MONTHLY, Tier.ANNUAL)


def test_a_change_to_the_free_tier_ends_the_period() -> None:
    membership = an_active(Tier.MONTHLY)

    changed = membership.change_tier(Tier.FREE, NOON)

    assert membership.current_period_end is None
    assert changed.period_end is None
    assert membership.is_running(IN_A_YEAR)


def test_a_cancelled_membership_runs_to_the_end_of_its_period() -> None:
    membership = an_active()

    cancelled = membership.cancel(NOON)

    assert cancelled.ends_at == IN_A_MONTH
    assert membership.is_running(IN_A_MONTH - timedelta(seconds=1))
    assert not membership.is_running(IN_A_MONTH)


def test_a_cancelled_free_membership_has_ended_at_once() -> None:
    membership = an_active(Tier.FREE)

    cancelled = membership.cancel(NOON)

    assert cancelled.ends_at == NOON
    assert not membership.is_running(NOON)


def test_an_active_membership_runs_past_its_period_until_it_expires() -> None:
    membership = an_active()

    assert membership.is_running(IN_TWO_MONTHS)
    membership.expire(IN_TWO_MONTHS)
    assert not membership.is_running(IN_TWO_MONTHS)


@pytest.mark.parametrize(
    "membership",
    [a_pending(), a_pending(Tier.FREE), an_active(), a_cancelled(), a_cancelled(Tier.FREE)],
    ids=["pending", "pending free", "active", "cancelled", "cancelled free"],
)
def test_what_is_over_expires(membership: Membership) -> None:
    expired = membership.expire(IN_A_MONTH)

    assert membership.status is Status.EXPIRED
    assert expired.membership_id == membership.id


# Refusals -------------------------------------------------------------------------------------

ACTIVATE, RENEW, CHANGE, CANCEL, EXPIRE = (
    lambda membership: membership.activate(NOON, IN_A_MONTH),
    lambda membership: membership.renew(IN_TWO_MONTHS, NOON),
    lambda membership: membership.change_tier(Tier.ANNUAL, NOON, IN_A_YEAR),
    lambda membership: membership.cancel(NOON),
    lambda membership: membership.expire(IN_A_YEAR),
)


@pytest.mark.parametrize(
    ("membership", "action", "word"),
    [
        (an_active, ACTIVATE, "activated"),
        (a_cancelled, ACTIVATE, "activated"),
        (an_expired, ACTIVATE, "activated"),
        (a_pending, RENEW, "renewed"),
        (a_cancelled, RENEW, "renewed"),
        (an_expired, RENEW, "renewed"),
        (a_pending, CHANGE, "moved to another tier"),
        (a_cancelled, CHANGE, "moved to another tier"),
        (an_expired, CHANGE, "moved to another tier"),
        (a_cancelled, CANCEL, "cancelled"),
        (an_expired, CANCEL, "cancelled"),
        (an_expired, EXPIRE, "expired"),
    ],
)
def test_an_action_out_of_turn_is_refused(
    membership: Callable[[], Membership], action: Callable[[Membership], object], word: str
) -> None:
    out_of_turn = membership()

    with pytest.raises(WrongStatus, match=f"is {out_of_turn.status.value} and cannot be {word}") as refusal:
        action(out_of_turn)

    assert refusal.value.membership_id == out_of_turn.id


def test_a_membership_cannot_expire_while_it_runs() -> None:
    for membership in (an_active(), a_cancelled()):
        with pytest.raises(StillRunning) as refusal:
            membership.expire(IN_A_MONTH - timedelta(seconds=1))
        assert refusal.value.runs_until == IN_A_MONTH


def test_an_active_free_membership_is_neither_renewed_nor_expired() -> None:
    membership = an_active(Tier.FREE)

    with pytest.raises(FreeTierHasNoPeriod, match="renewed"):
        membership.renew(IN_A_MONTH, NOON)
    with pytest.raises(FreeTierHasNoPeriod, match="expired"):
        membership.expire(IN_A_YEAR)


def test_a_change_to_the_same_tier_is_refused() -> None:
    with pytest.raises(SameTier, match="already on the monthly tier"):
        an_active(Tier.MONTHLY).change_tier(Tier.MONTHLY, NOON, IN_A_YEAR)


@pytest.mark.parametrize(
    "action",
    [
        lambda: a_pending(Tier.MONTHLY).activate(NOON),
        lambda: a_pending(Tier.MONTHLY).activate(NOON, NOON),
        lambda: a_pending(Tier.MONTHLY).activate(NOON, IN_A_MONTH.replace(tzinfo=None)),
        lambda: a_pending(Tier.FREE).activate(NOON, IN_A_MONTH),
        lambda: an_active(Tier.MONTHLY).renew(NOON, NOON),
        lambda: an_active(Tier.MONTHLY).renew(IN_TWO_MONTHS.replace(tzinfo=None), NOON),
        lambda: an_active(Tier.MONTHLY).change_tier(Tier.ANNUAL, NOON),
        lambda: an_active(Tier.MONTHLY).change_tier(Tier.FREE, NOON, IN_A_YEAR),
    ],
    ids=[
        "paid without an end",
        "ends when it starts",
        "no time zone",
        "free with an end",
        "renewed into the past",
        "renewed without a time zone",
        "to paid without an end",
        "to free with an end",
    ],
)
def test_a_period_that_cannot_be_is_refused(action: Callable[[], object]) -> None:
    with pytest.raises(InvalidValue):
        action()


def test_a_refused_change_changes_nothing() -> None:
    membership = an_active(Tier.MONTHLY)
    before = everything(membership)

    with pytest.raises(InvalidValue):
        membership.change_tier(Tier.ANNUAL, NOON)

    assert everything(membership) == before


def everything(membership: Membership) -> dict[str, object]:
    return dict(vars(membership))


@given(
    actions=st.lists(
        st.sampled_from(["activate", "renew", "change_tier", "cancel", "expire"]).flatmap(
            lambda name: st.tuples(
                st.just(name),
                st.sampled_from(Tier),
                st.integers(0, 3),
                st.sampled_from([None, 2, 30]),
            )
        ),
        max_size=12,
    ),
    tier=st.sampled_from(Tier),
)
def test_whatever_is_tried_a_refusal_changes_nothing_and_the_periods_stay_sound(
    actions: list[tuple[str, Tier, int, int | None]], tier: Tier
) -> None:
    membership = Membership.start("user-1", tier, NOON)[0]

    for name, new_tier, day, end in actions:
        at, until = NOON + timedelta(days=day), None if end is None else NOON + timedelta(days=end)
        before = everything(membership)
        try:
            match name:
                case "activate":
                    membership.activate(at, until)
                case "renew":
                    membership.renew(until or at, at)
                case "change_tier":
                    membership.change_tier(new_tier, at, until)
                case "cancel":
                    membership.cancel(at)
                case "expire":
                    membership.expire(at)
        except DomainError:
            assert everything(membership) == before

        start, stop = membership.current_period_start, membership.current_period_end
        assert (start is None) == (stop is None)
        assert start is None or stop is None or start < stop
        if membership.tier is Tier.FREE:
            assert stop is None
        elif membership.status is Status.ACTIVE:
            assert stop is not None


# Money ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("membership", [a_pending, an_active, a_cancelled, an_expired])
def test_money_moves_in_every_status(membership: Callable[[], Membership]) -> None:
    paid = membership().pay(TEN_EUROS, "in_1", "March", NOON)
    refunded = membership().refund(TEN_EUROS, "in_1", "March", NOON)

    assert paid.amount == refunded.amount == TEN_EUROS
    assert (paid.invoice_id, paid.description) == ("in_1", "March")


@pytest.mark.parametrize("amount_minor", [0, -1, 2**63])
def test_an_amount_that_is_not_positive_or_does_not_fit_is_refused(amount_minor: int) -> None:
    for action in (an_active().pay, an_active().refund):
        with pytest.raises(InvalidValue, match="1 to 2"):
            action(Money(amount_minor, "EUR"), "in_1", "March", NOON)


def test_money_without_an_invoice_is_refused() -> None:
    for action in (an_active().pay, an_active().refund):
        with pytest.raises(InvalidValue, match="invoice_id"):
            action(TEN_EUROS, " ", "March", NOON)
