"""The use cases of billing. `until` is the end of a period as the payment provider reports it."""

from datetime import datetime
from uuid import UUID

from domain.billing.events import Tier
from domain.billing.membership import Membership
from domain.billing.repository import Memberships
from dovecote.events.money import Money
from dovecote.unit_of_work import UnitOfWork


def start_membership(
    uow: UnitOfWork,
    user_id: str,
    tier: Tier,
    at: datetime,
    *,
    stripe_customer_id: str | None = None,
    stripe_subscription_id: str | None = None,
) -> Membership:
    """Open a membership that waits for its activation."""
    membership, started = Membership.start(user_id, tier, at, stripe_customer_id, stripe_subscription_id)
    Memberships(uow).add(membership)
    uow.emit(started)
    return membership


def activate_membership(uow: UnitOfWork, membership_id: UUID, at: datetime, *, until: datetime | None = None) -> None:
    """Activate a pending membership: a paid tier runs `until` a time, the free tier without an end."""
    membership = Memberships(uow).get(membership_id)
    uow.emit(membership.activate(at, until))


def renew_membership(uow: UnitOfWork, membership_id: UUID, until: datetime, at: datetime) -> None:
    """Add the next period to an active paid membership."""
    membership = Memberships(uow).get(membership_id)
    uow.emit(membership.renew(until, at))


def change_tier(
    uow: UnitOfWork, membership_id: UUID, tier: Tier, at: datetime, *, until: datetime | None = None
) -> None:
    """Move an active membership to another tier at once."""
    membership = Memberships(uow).get(membership_id)
    uow.emit(membership.change_tier(tier, at, until))


def cancel_membership(uow: UnitOfWork, membership_id: UUID, at: datetime) -> None:
    """End a membership with its period."""
    membership = Memberships(uow).get(membership_id)
    uow.emit(membership.cancel(at))


def expire_membership(uow: UnitOfWork, membership_id: UUID, at: datetime) -> None:
    """End a membership whose period is over, for good."""
    membership = Memberships(uow).get(membership_id)
    uow.emit(membership.expire(at))


def record_payment(
    uow: UnitOfWork, membership_id: UUID, amount: Money, invoice_id: str, description: str, at: datetime
) -> None:
    """Record a payment for a membership."""
    membership = Memberships(uow).get(membership_id)
    uow.emit(membership.pay(amount, invoice_id, description, at))


def record_refund(
    uow: UnitOfWork, membership_id: UUID, amount: Money, invoice_id: str, description: str, at: datetime
) -> None:
    """Record a refund; the amount is positive."""
    membership = Memberships(uow).get(membership_id)
    uow.emit(membership.refund(amount, invoice_id, description, at))
