"""The tables of verification, and how a row becomes a Challenge."""

from datetime import datetime
from uuid import UUID

from sqlalchemy import Column, DateTime, Index, Integer, Table, Text, UniqueConstraint, Uuid, delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from domain.database import mapper, metadata
from domain.errors import NotFound
from domain.unit_of_work import UnitOfWork
from domain.verification.challenge import Challenge

challenges = Table(
    "challenges",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("user_id", Text, nullable=False),
    Column("phone_hash", Text, nullable=False),
    Column("phone_ciphertext", Text, nullable=False),
    Column("phone_last4", Text, nullable=False),
    Column("code_hash", Text, nullable=False),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("tries_left", Integer, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    UniqueConstraint("user_id", "phone_hash", name="challenges_one_per_user_and_phone"),
    Index("challenges_expiry_idx", "expires_at"),
)

verified_phones = Table(
    "verified_phones",
    metadata,
    Column("user_id", Text, primary_key=True),
    Column("phone_hash", Text, primary_key=True),
    Column("verified_at", DateTime(timezone=True), nullable=False),
)

mapper.map_imperatively(Challenge, challenges)


class Challenges:
    """The open challenges, at most one for a user and a number."""

    def __init__(self, uow: UnitOfWork) -> None:
        self._session: Session = uow.session

    def put(self, challenge: Challenge) -> None:
        """Add a challenge in place of the one its user had open for the same number.

        One statement: of two requests at the same time the later wins, and its code alone works.
        """
        values = {column.name: getattr(challenge, column.name) for column in challenges.columns}
        self._session.execute(
            insert(challenges)
            .values(values)
            .on_conflict_do_update(constraint="challenges_one_per_user_and_phone", set_=values)
        )

    def get(self, challenge_id: UUID) -> Challenge:
        """Return a challenge for judging an answer; its row is locked until the end.

        Without the lock two answers at once would cost one try, and their events could change places.
        Errors: NotFound once it was answered rightly, replaced or purged.
        """
        challenge = self._session.scalars(
            select(Challenge)
            .where(challenges.c.id == challenge_id)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).one_or_none()
        if challenge is None:
            raise NotFound(f"there is no challenge {challenge_id}; it was answered, replaced or is long over")
        return challenge

    def find(self, challenge_id: UUID) -> Challenge | None:
        """Return a challenge for looking at; nothing is locked."""
        return self._session.scalars(
            select(Challenge).where(challenges.c.id == challenge_id).execution_options(populate_existing=True)
        ).one_or_none()

    def remove(self, challenge: Challenge) -> None:
        self._session.delete(challenge)

    def remove_expired(self, before: datetime) -> int:
        """Remove what expired before a moment and return how many that were."""
        gone = self._session.execute(
            delete(challenges).where(challenges.c.expires_at < before).returning(challenges.c.id)
        )
        return len(gone.all())


class VerifiedPhones:
    """Which user has proven which number, known by its keyed hash."""

    def __init__(self, uow: UnitOfWork) -> None:
        self._session: Session = uow.session

    def add(self, user_id: str, phone_hash: str, at: datetime) -> None:
        """Remember the proof; a number proven again gets the later moment."""
        self._session.execute(
            insert(verified_phones)
            .values(user_id=user_id, phone_hash=phone_hash, verified_at=at)
            .on_conflict_do_update(constraint="verified_phones_pkey", set_={"verified_at": at})
        )

    def verified_at(self, user_id: str, phone_hash: str) -> datetime | None:
        """Return when the user last proved the number, or None."""
        columns = verified_phones.c
        return self._session.scalar(
            select(columns.verified_at).where(columns.user_id == user_id, columns.phone_hash == phone_hash)
        )
