"""The billing history: one line for each event, written by the consumer, once, and never changed.

It stands alone: no foreign key leads to `memberships`, since an event may come from a writer whose
memberships live elsewhere.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import assert_never
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    select,
    text,
)

from domain.billing.events import (
    BillingEvent,
    MembershipActivated,
    MembershipCancelled,
    MembershipExpired,
    MembershipRenewed,
    MembershipStarted,
    PaymentRecorded,
    PaymentRefunded,
    TierChanged,
)
from dovecote.database import metadata
from dovecote.events.money import Money
from dovecote.unit_of_work import UnitOfWork

billing_history = Table(
    "billing_history",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("membership_id", Uuid, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("amount_minor", BigInteger),
    Column("currency", Text),
    Column("invoice_id", Text),
    Column("description", Text, nullable=False),
    Column("occurred_at", DateTime(timezone=True), nullable=False),
    Column("source_event_id", Uuid, nullable=False),
    Column("recorded_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    UniqueConstraint("source_event_id", name="billing_history_one_line_per_event"),
    CheckConstraint("(amount_minor is null) = (currency is null)", name="billing_history_amount_has_a_currency"),
    Index("billing_history_membership_idx", "membership_id", "occurred_at"),
)

# Words, not a built expression: this runs once an event, hundreds of times a transaction.
_write = text(
    """
    insert into dovecote.billing_history (membership_id, user_id, event_type, amount_minor, currency,
                                          invoice_id, description, occurred_at, source_event_id)
    values (:membership_id, :user_id, :event_type, :amount_minor, :currency,
            :invoice_id, :description, :occurred_at, :source_event_id)
    on conflict (source_event_id) do nothing
    """
)


@dataclass(frozen=True, kw_only=True)
class HistoryLine:
    """What the history says about one event; `amount` is negative for money that went back."""

    membership_id: UUID
    user_id: str
    event_type: str
    amount: Money | None
    invoice_id: str | None
    description: str
    occurred_at: datetime
    source_event_id: UUID


def line_for(event: BillingEvent) -> HistoryLine:
    """Return the line for an event."""
    amount, invoice_id = _money(event)
    return HistoryLine(
        membership_id=event.membership_id,
        user_id=event.user_id,
        event_type=event.type,
        amount=amount,
        invoice_id=invoice_id,
        description=_in_words(event),
        occurred_at=event.occurred_at,
        source_event_id=event.event_id,
    )


class History:
    """The lines of `billing_history`."""

    def __init__(self, uow: UnitOfWork) -> None:
        self._session = uow.session

    def write(self, line: HistoryLine) -> None:
        """Add a line; a second line for the same event changes nothing, even in a forced replay."""
        self._session.execute(
            _write,
            {
                "membership_id": line.membership_id,
                "user_id": line.user_id,
                "event_type": line.event_type,
                "amount_minor": line.amount.amount_minor if line.amount else None,
                "currency": line.amount.currency if line.amount else None,
                "invoice_id": line.invoice_id,
                "description": line.description,
                "occurred_at": line.occurred_at,
                "source_event_id": line.source_event_id,
            },
        )

    def of(self, membership_id: UUID) -> list[HistoryLine]:
        """Return the lines of a membership, oldest first."""
        columns = billing_history.c
        rows = self._session.execute(
            select(billing_history)
            .where(columns.membership_id == membership_id)
            .order_by(columns.occurred_at, columns.id)
        )
        return [
            HistoryLine(
                membership_id=row.membership_id,
                user_id=row.user_id,
                event_type=row.event_type,
                amount=None if row.currency is None else Money(row.amount_minor, row.currency),
                invoice_id=row.invoice_id,
                description=row.description,
                occurred_at=row.occurred_at,
                source_event_id=row.source_event_id,
            )
            for row in rows
        ]


def _money(event: BillingEvent) -> tuple[Money | None, str | None]:
    match event:
        case PaymentRecorded():
            return event.amount, event.invoice_id
        case PaymentRefunded():
            return -event.amount, event.invoice_id
        case _:
            return None, None


def _in_words(event: BillingEvent) -> str:
    match event:
        case MembershipStarted():
            return f"Started on the {event.tier.value} tier"
        case MembershipActivated():
            return f"Activated on the {event.tier.value} tier{_until(event.period_end)}"
        case MembershipRenewed():
            return f"Renewed on the {event.tier.value} tier{_until(event.period_end)}"
        case TierChanged():
            return f"Moved from {event.previous_tier.value} to {event.tier.value}{_until(event.period_end)}"
        case MembershipCancelled():
            return f"Cancelled, runs{_until(event.ends_at)}" if event.ends_at > event.occurred_at else "Cancelled"
        case MembershipExpired():
            return "Expired"
        case PaymentRecorded() | PaymentRefunded():
            return event.description
        case _:
            assert_never(event)


def _until(end: datetime | None) -> str:
    return f" until {end:%Y-%m-%d}" if end else ""
