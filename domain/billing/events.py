"""The events of billing. Each names the membership and its user, so that a reader needs no look-up."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any
from uuid import UUID

from dovecote.events import Event, upcaster
from dovecote.events.money import Money


class Tier(Enum):
    """What a member pays for: nothing, months or years. The values are on the wire and never change."""

    FREE = "free"
    MONTHLY = "monthly"
    ANNUAL = "annual"


@dataclass(frozen=True, kw_only=True)
class MembershipStarted(Event, type="billing.membership_started.v1", aggregate="membership", key="membership_id"):
    """A membership was requested; it is not active yet."""

    membership_id: UUID
    user_id: str
    tier: Tier


@dataclass(frozen=True, kw_only=True)
class MembershipActivated(Event, type="billing.membership_activated.v1", aggregate="membership", key="membership_id"):
    """The membership runs; the free tier without a period."""

    membership_id: UUID
    user_id: str
    tier: Tier
    period_start: datetime | None
    period_end: datetime | None


@dataclass(frozen=True, kw_only=True)
class MembershipRenewed(Event, type="billing.membership_renewed.v1", aggregate="membership", key="membership_id"):
    """The next period follows the last one without a gap."""

    membership_id: UUID
    user_id: str
    tier: Tier
    period_start: datetime
    period_end: datetime


@dataclass(frozen=True, kw_only=True)
class TierChanged(Event, type="billing.tier_changed.v1", aggregate="membership", key="membership_id"):
    """From now on it is another tier, with a period of its own; the free tier has none."""

    membership_id: UUID
    user_id: str
    previous_tier: Tier
    tier: Tier
    period_start: datetime | None
    period_end: datetime | None


@dataclass(frozen=True, kw_only=True)
class MembershipCancelled(Event, type="billing.membership_cancelled.v2", aggregate="membership", key="membership_id"):
    """It will not be renewed. `ends_at` is the end of its period; the time of the cancellation, if it had none."""

    membership_id: UUID
    user_id: str
    ends_at: datetime


@upcaster("billing.membership_cancelled.v1", "billing.membership_cancelled.v2")
def _cancelled_v1_to_v2(payload: Mapping[str, Any]) -> dict[str, Any]:
    # The first version left it open when a membership without a period ends: at once.
    fields = dict(payload)
    runs_until = fields.pop("runs_until")
    return {**fields, "ends_at": runs_until or fields["occurred_at"]}


@dataclass(frozen=True, kw_only=True)
class MembershipExpired(Event, type="billing.membership_expired.v1", aggregate="membership", key="membership_id"):
    """It is over, for good."""

    membership_id: UUID
    user_id: str


@dataclass(frozen=True, kw_only=True)
class PaymentRecorded(Event, type="billing.payment_recorded.v1", aggregate="membership", key="membership_id"):
    """Money came in; `amount` is positive."""

    membership_id: UUID
    user_id: str
    amount: Money
    invoice_id: str
    description: str


@dataclass(frozen=True, kw_only=True)
class PaymentRefunded(Event, type="billing.payment_refunded.v1", aggregate="membership", key="membership_id"):
    """Money went back; `amount` is what went back, positive. Only the history writes it with a minus."""

    membership_id: UUID
    user_id: str
    amount: Money
    invoice_id: str
    description: str


BillingEvent = (
    MembershipStarted
    | MembershipActivated
    | MembershipRenewed
    | TierChanged
    | MembershipCancelled
    | MembershipExpired
    | PaymentRecorded
    | PaymentRefunded
)
