"""The table of memberships, and how a row becomes a Membership."""

from enum import Enum as PythonEnum
from uuid import UUID

from sqlalchemy import Column, DateTime, Enum, Index, Integer, Table, Text, UniqueConstraint, Uuid, select

from domain.billing.events import Tier
from domain.billing.membership import Membership, Status
from dovecote.database import mapper, metadata
from dovecote.errors import NotFound
from dovecote.unit_of_work import UnitOfWork


def _words(kind: type[PythonEnum]) -> Enum:
    # Stored by value, and back as the member: an enum that comes back as text fails `is` in silence.
    return Enum(
        kind,
        native_enum=False,
        create_constraint=False,
        length=20,
        values_callable=lambda members: [member.value for member in members],
    )


memberships = Table(
    "memberships",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("tier", _words(Tier), nullable=False),
    Column("status", _words(Status), nullable=False),
    Column("stripe_customer_id", Text),
    Column("stripe_subscription_id", Text),
    Column("current_period_start", DateTime(timezone=True)),
    Column("current_period_end", DateTime(timezone=True)),
    Column("version", Integer, nullable=False),
    UniqueConstraint("stripe_subscription_id", name="memberships_one_per_stripe_subscription"),
    Index("memberships_user_idx", "user_id"),
)

mapper.map_imperatively(Membership, memberships, version_id_col=memberships.c.version)


class Memberships:
    """All memberships."""

    def __init__(self, uow: UnitOfWork) -> None:
        self._session = uow.session

    def add(self, membership: Membership) -> None:
        self._session.add(membership)

    def get(self, membership_id: UUID) -> Membership:
        """Return a membership to change it or to emit an event of it; its row is locked until the end.

        The lock is what keeps its events in order: a payment changes no column, so without it two
        transactions could take their outbox positions in one order and commit in the other.
        Errors: NotFound.
        """
        # A select, not Session.get: it flushes first, and reads again what was read without the lock.
        membership = self._session.scalars(
            select(Membership)
            .where(memberships.c.id == membership_id)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one_or_none()
        if membership is None:
            raise NotFound(f"there is no membership {membership_id}")
        return membership

    def of_user(self, user_id: str) -> list[Membership]:
        """Return a user's memberships for looking at, oldest first; nothing is locked."""
        return list(
            self._session.scalars(select(Membership).where(memberships.c.user_id == user_id).order_by(memberships.c.id))
        )
