"""The events of verification. No number, no code and no part of them: the outbox is read by many."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from dovecote.events import Event


@dataclass(frozen=True, kw_only=True)
class CodeRequested(Event, type="verification.code_requested.v1", aggregate="challenge", key="challenge_id"):
    """A challenge waits for its code. The code follows from this event's id and a secret: see `code_for`."""

    challenge_id: UUID
    expires_at: datetime


@dataclass(frozen=True, kw_only=True)
class CodeRejected(Event, type="verification.code_rejected.v1", aggregate="challenge", key="challenge_id"):
    """An answer was wrong and cost a try."""

    challenge_id: UUID
    tries_left: int


@dataclass(frozen=True, kw_only=True)
class PhoneVerified(Event, type="verification.phone_verified.v1", aggregate="challenge", key="challenge_id"):
    """The answer was right: the user holds the phone. The challenge is gone."""

    challenge_id: UUID
    user_id: str
