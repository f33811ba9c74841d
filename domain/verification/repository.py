"""The tables of verification, and how a row becomes a Challenge."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    Column,
    DateTime,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    delete,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.orm import Session

from domain.verification.challenge import Challenge
from domain.verification.limits import Limits, Quota, QuotaKind
from dovecote.database import mapper, metadata
from dovecote.errors import NotFound
from dovecote.unit_of_work import UnitOfWork

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

verification_quotas = Table(
    "verification_quotas",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("codes_at", ARRAY(DateTime(timezone=True)), nullable=False),
    Column("answers_at", ARRAY(DateTime(timezone=True)), nullable=False),
    Column("last_at", DateTime(timezone=True), nullable=False),
    Index("verification_quotas_last_idx", "last_at"),
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
            raise _not_found(challenge_id)
        return challenge

    def of_user(self, challenge_id: UUID, user_id: str) -> Challenge:
        """Return a challenge of this user for looking at; nothing is locked.

        Errors: NotFound, with the same message as for one that does not exist, for a challenge of another user.
        """
        challenge = self.find(challenge_id)
        if challenge is None or challenge.user_id != user_id:
            raise _not_found(challenge_id)
        return challenge

    def find(self, challenge_id: UUID) -> Challenge | None:
        """Return a challenge for looking at; nothing is locked."""
        return self._session.scalars(
            select(Challenge).where(challenges.c.id == challenge_id).execution_options(populate_existing=True)
        ).one_or_none()

    def remove(self, challenge: Challenge) -> None:
        self._session.delete(challenge)

    def remove_expired(self, before: datetime, limit: int) -> int:
        """Remove at most `limit` that expired before then; return how many. Skips locked rows."""
        expired = (
            select(challenges.c.id)
            .where(challenges.c.expires_at < before)
            .order_by(challenges.c.expires_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        return len(
            self._session.scalars(
                delete(challenges).where(challenges.c.id.in_(expired)).returning(challenges.c.id)
            ).all()
        )

    def remove_of(self, user_id: str) -> int:
        """Remove all of a user and return how many that were."""
        return len(
            self._session.scalars(
                delete(challenges).where(challenges.c.user_id == user_id).returning(challenges.c.id)
            ).all()
        )


def _not_found(challenge_id: UUID) -> NotFound:
    return NotFound(f"there is no challenge {challenge_id}; it was answered, replaced or is long over")


class Quotas:
    """What phone numbers and users have used of their quotas. Every count is made here, so none is bypassed."""

    def __init__(self, uow: UnitOfWork) -> None:
        self._session: Session = uow.session

    def lock(self, phone_hash: str, user_id: str, limits: Limits, at: datetime) -> list[Quota]:
        """Return the quotas of a number and of a user; both are locked until the end.

        The number's always first: two requests, whatever their users and numbers, never wait for each other.
        """
        columns = verification_quotas.c
        quotas = _quotas_of(phone_hash, user_id, limits)
        asked = insert(verification_quotas).values(
            [
                {"kind": quota.kind, "subject": quota.subject, "codes_at": [], "answers_at": [], "last_at": at}
                for quota in quotas
            ]
        )
        # The update changes nothing: it locks each row, in this order, and returns what is in it, also if it was just
        # committed.
        locked = self._session.execute(
            asked.on_conflict_do_update(
                constraint="verification_quotas_pkey", set_={"subject": asked.excluded.subject}
            ).returning(columns.kind, columns.codes_at, columns.answers_at)
        )
        used = {kind: times for kind, *times in locked}
        for quota in quotas:
            quota.codes_at, quota.answers_at = used[quota.kind]
        return quotas

    def find(self, phone_hash: str, user_id: str, limits: Limits) -> list[Quota]:
        """Return both for looking at; nothing is locked."""
        columns = verification_quotas.c
        quotas = _quotas_of(phone_hash, user_id, limits)
        for quota in quotas:
            used = self._session.execute(
                select(columns.codes_at, columns.answers_at).where(
                    columns.kind == quota.kind, columns.subject == quota.subject
                )
            ).one_or_none()
            if used:
                quota.codes_at, quota.answers_at = used
        return quotas

    def save(self, quotas: Sequence[Quota]) -> None:
        """Write down what was counted in quotas that are locked."""
        counted = insert(verification_quotas).values(
            [
                {
                    "kind": quota.kind,
                    "subject": quota.subject,
                    "codes_at": quota.codes_at,
                    "answers_at": quota.answers_at,
                    "last_at": max([*quota.codes_at, *quota.answers_at]),
                }
                for quota in quotas
            ]
        )
        changed = {name: counted.excluded[name] for name in ("codes_at", "answers_at", "last_at")}
        self._session.execute(counted.on_conflict_do_update(constraint="verification_quotas_pkey", set_=changed))

    def remove_idle(self, before: datetime, limit: int) -> int:
        """Remove at most `limit` that counted nothing since then; return how many. Skips locked rows."""
        columns = verification_quotas.c
        key = tuple_(columns.kind, columns.subject)
        idle = (
            select(columns.kind, columns.subject)
            .where(columns.last_at < before)
            .order_by(columns.last_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        return len(
            self._session.execute(delete(verification_quotas).where(key.in_(idle)).returning(columns.kind)).all()
        )


def _quotas_of(phone_hash: str, user_id: str, limits: Limits) -> list[Quota]:
    return [
        Quota(kind=QuotaKind.PHONE, subject=phone_hash, allowance=limits.phone),
        Quota(kind=QuotaKind.USER, subject=user_id, allowance=limits.user),
    ]


class VerifiedPhones:
    """Which user has proven which number, known by its keyed hash."""

    def __init__(self, uow: UnitOfWork) -> None:
        self._session: Session = uow.session

    def add(self, user_id: str, phone_hash: str, at: datetime) -> None:
        """Remember the proof; a number proven again gets the later time."""
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

    def remove_of(self, user_id: str) -> int:
        """Remove all of a user and return how many that were."""
        gone = delete(verified_phones).where(verified_phones.c.user_id == user_id)
        return len(self._session.scalars(gone.returning(verified_phones.c.phone_hash)).all())
