"""A membership and what may happen to it; no database, no clock, no Stripe."""

from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from uuid import UUID

from domain.billing.events import (
    MembershipActivated,
    MembershipCancelled,
    MembershipExpired,
    MembershipRenewed,
    MembershipStarted,
    PaymentRecorded,
    PaymentRefunded,
    Tier,
    TierChanged,
)
from dovecote.errors import InvalidValue, Refused
from dovecote.events.ids import uuid7
from dovecote.events.money import Money

Period = tuple[datetime, datetime] | tuple[None, None]

# The history keeps amounts as bigint.
_MAX_MINOR_UNITS = 2**63 - 1


class Status(Enum):
    """Where a membership is in its life. The values are stored and never change."""

    PENDING = "pending"
    ACTIVE = "active"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class WrongStatus(Refused):
    """The membership is at another point of its life."""

    def __init__(self, membership_id: UUID, status: Status, action: str) -> None:
        super().__init__(f"membership {membership_id} is {status.value} and cannot be {action}")
        self.membership_id = membership_id
        self.status = status


class SameTier(Refused):
    """It is on that tier already."""

    def __init__(self, membership_id: UUID, tier: Tier) -> None:
        super().__init__(f"membership {membership_id} is already on the {tier.value} tier")
        self.membership_id = membership_id
        self.tier = tier


class FreeTierHasNoPeriod(Refused):
    """The free tier runs without an end: nothing to renew and nothing to expire. Cancel it instead."""

    def __init__(self, membership_id: UUID, action: str) -> None:
        super().__init__(f"membership {membership_id} has no period and cannot be {action}")
        self.membership_id = membership_id


class StillRunning(Refused):
    """What was paid for has not ended yet."""

    def __init__(self, membership_id: UUID, runs_until: datetime) -> None:
        super().__init__(f"membership {membership_id} runs until {runs_until} and cannot expire before")
        self.membership_id = membership_id
        self.runs_until = runs_until


@dataclass(kw_only=True, eq=False)
class Membership:
    """One user's subscription, from its start until it has expired for good.

        pending -> activate -> active -> cancel -> cancelled -> expire -> expired

    An active one is renewed and changes its tier. A pending one may be cancelled or expire, which is an
    abandoned checkout. An active one expires when its period ends without a renewal. A cancelled one
    keeps running to the end of its period; there is no way back, start another membership instead.
    Paid tiers have a period from activation on; the free tier never has one.
    Payments and refunds are accepted in any status, even after the end.
    """

    id: UUID
    user_id: str
    tier: Tier
    status: Status = Status.PENDING
    stripe_customer_id: str | None = None
    stripe_subscription_id: str | None = None
    current_period_start: datetime | None = None
    current_period_end: datetime | None = None
    version: int = 0  # counted by the repository

    @classmethod
    def start(
        cls,
        user_id: str,
        tier: Tier,
        at: datetime,
        stripe_customer_id: str | None = None,
        stripe_subscription_id: str | None = None,
    ) -> "tuple[Membership, MembershipStarted]":
        """Return a pending membership and the event that records it.

        Errors: InvalidValue for a user id that is empty or not printable.
        """
        if not user_id.strip() or not user_id.isprintable():
            raise InvalidValue("a membership belongs to a user: user_id is empty or not printable")
        membership = cls(
            id=uuid7(),
            user_id=user_id,
            tier=tier,
            stripe_customer_id=stripe_customer_id,
            stripe_subscription_id=stripe_subscription_id,
        )
        return membership, MembershipStarted(membership_id=membership.id, user_id=user_id, tier=tier, occurred_at=at)

    def activate(self, at: datetime, until: datetime | None = None) -> MembershipActivated:
        """Start it now: a paid tier runs `until` a time, the free tier without an end."""
        self._only("activated", Status.PENDING)
        period = _period(self.tier, at, until)
        self.status = Status.ACTIVE
        self.current_period_start, self.current_period_end = period
        return MembershipActivated(
            membership_id=self.id,
            user_id=self.user_id,
            tier=self.tier,
            period_start=self.current_period_start,
            period_end=self.current_period_end,
            occurred_at=at,
        )

    def renew(self, until: datetime, at: datetime) -> MembershipRenewed:
        """Add the period from the end of the current one `until` a later time.

        The same renewal twice is refused, since its period would end where it starts.
        """
        self._only("renewed", Status.ACTIVE)
        if self.current_period_end is None:
            raise FreeTierHasNoPeriod(self.id, "renewed")
        _check_period(self.current_period_end, until)
        self.current_period_start, self.current_period_end = self.current_period_end, until
        return MembershipRenewed(
            membership_id=self.id,
            user_id=self.user_id,
            tier=self.tier,
            period_start=self.current_period_start,
            period_end=self.current_period_end,
            occurred_at=at,
        )

    def change_tier(self, tier: Tier, at: datetime, until: datetime | None = None) -> TierChanged:
        """Move to another tier at once; a paid one begins a period of its own.

        What is left of the old period is not counted here: the payment provider prorates it and
        reports it as a payment or a refund.
        """
        self._only("moved to another tier", Status.ACTIVE)
        if tier is self.tier:
            raise SameTier(self.id, tier)
        period = _period(tier, at, until)
        previous_tier, self.tier = self.tier, tier
        self.current_period_start, self.current_period_end = period
        return TierChanged(
            membership_id=self.id,
            user_id=self.user_id,
            previous_tier=previous_tier,
            tier=tier,
            period_start=self.current_period_start,
            period_end=self.current_period_end,
            occurred_at=at,
        )

    def cancel(self, at: datetime) -> MembershipCancelled:
        """End it with its period; one without a period ends at once."""
        self._only("cancelled", Status.PENDING, Status.ACTIVE)
        self.status = Status.CANCELLED
        return MembershipCancelled(
            membership_id=self.id, user_id=self.user_id, ends_at=self.current_period_end or at, occurred_at=at
        )

    def expire(self, at: datetime) -> MembershipExpired:
        """End it for good: its period is over and was not renewed, or it never ran."""
        self._only("expired", Status.PENDING, Status.ACTIVE, Status.CANCELLED)
        if self.current_period_end is not None and at < self.current_period_end:
            raise StillRunning(self.id, self.current_period_end)
        if self.status is Status.ACTIVE and self.current_period_end is None:
            raise FreeTierHasNoPeriod(self.id, "expired")
        self.status = Status.EXPIRED
        return MembershipExpired(membership_id=self.id, user_id=self.user_id, occurred_at=at)

    def pay(self, amount: Money, invoice_id: str, description: str, at: datetime) -> PaymentRecorded:
        """Record a payment, in any status: it may come before activation or after the end."""
        _check_payment(amount, invoice_id)
        return PaymentRecorded(
            membership_id=self.id,
            user_id=self.user_id,
            amount=amount,
            invoice_id=invoice_id,
            description=description,
            occurred_at=at,
        )

    def refund(self, amount: Money, invoice_id: str, description: str, at: datetime) -> PaymentRefunded:
        """Record a refund, as a positive amount.

        The payment provider refuses a refund of more than was paid; no sums are kept here.
        """
        _check_payment(amount, invoice_id)
        return PaymentRefunded(
            membership_id=self.id,
            user_id=self.user_id,
            amount=amount,
            invoice_id=invoice_id,
            description=description,
            occurred_at=at,
        )

    def is_running(self, at: datetime) -> bool:
        """Whether the user has what was promised.

        An active one runs until it is expired, even past its period: a late renewal locks nobody out.
        """
        if self.status is Status.ACTIVE:
            return True
        cancelled = self.status is Status.CANCELLED
        return cancelled and self.current_period_end is not None and at < self.current_period_end

    def _only(self, action: str, *allowed: Status) -> None:
        if self.status not in allowed:
            raise WrongStatus(self.id, self.status, action)


def _period(tier: Tier, start: datetime, until: datetime | None) -> Period:
    if tier is Tier.FREE:
        if until is not None:
            raise InvalidValue(f"the free tier has no period, got one until {until}")
        return None, None
    if until is None:
        raise InvalidValue(f"the {tier.value} tier has a period: say until when")
    _check_period(start, until)
    return start, until


def _check_period(start: datetime, until: datetime) -> None:
    if until.tzinfo is None or start.tzinfo is None:
        raise InvalidValue(f"a time needs a time zone, got a period from {start} until {until}")
    if until <= start:
        raise InvalidValue(f"a period ends after it starts, got one from {start} until {until}")


def _check_payment(amount: Money, invoice_id: str) -> None:
    if not 0 < amount.amount_minor <= _MAX_MINOR_UNITS:
        raise InvalidValue(f"a payment or refund is 1 to 2**63 - 1 minor units, got {amount}")
    if not invoice_id.strip():
        raise InvalidValue("a payment or refund names its invoice: invoice_id is empty")
