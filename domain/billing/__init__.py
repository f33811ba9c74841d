"""Memberships, what was paid for them, and the history people are shown."""

from domain.billing.events import (
    BillingEvent,
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
from domain.billing.history import History, HistoryLine, line_for
from domain.billing.membership import (
    FreeTierHasNoPeriod,
    Membership,
    SameTier,
    Status,
    StillRunning,
    WrongStatus,
)
from domain.billing.repository import Memberships
from domain.billing.service import (
    activate_membership,
    cancel_membership,
    change_tier,
    expire_membership,
    record_payment,
    record_refund,
    renew_membership,
    start_membership,
)

__all__ = [
    "BillingEvent",
    "FreeTierHasNoPeriod",
    "History",
    "HistoryLine",
    "Membership",
    "MembershipActivated",
    "MembershipCancelled",
    "MembershipExpired",
    "MembershipRenewed",
    "MembershipStarted",
    "Memberships",
    "PaymentRecorded",
    "PaymentRefunded",
    "SameTier",
    "Status",
    "StillRunning",
    "Tier",
    "TierChanged",
    "WrongStatus",
    "activate_membership",
    "cancel_membership",
    "change_tier",
    "expire_membership",
    "line_for",
    "record_payment",
    "record_refund",
    "renew_membership",
    "start_membership",
]
