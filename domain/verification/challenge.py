"""One attempt to prove a phone number: how its code comes about and how an answer is judged."""

import hashlib
import hmac
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from domain.errors import InvalidValue, Refused
from domain.ids import uuid7
from domain.privacy import Keyring
from domain.verification.events import CodeRejected, CodeRequested, PhoneVerified

# Together they keep guessing hopeless: 3 of 1,000,000 codes before the challenge is dead.
LIFE = timedelta(minutes=5)
TRIES = 3
_CODE_DIGITS = 6


class ChallengeExpired(Refused):
    """Its time is over; request another code."""

    def __init__(self, challenge_id: UUID, expired_at: datetime) -> None:
        super().__init__(f"challenge {challenge_id} expired at {expired_at}; request another code")
        self.challenge_id = challenge_id
        self.expired_at = expired_at


class NoTriesLeft(Refused):
    """Too many wrong answers; request another code."""

    def __init__(self, challenge_id: UUID) -> None:
        super().__init__(f"challenge {challenge_id} has no tries left; request another code")
        self.challenge_id = challenge_id


@dataclass(kw_only=True, eq=False)
class Challenge:
    """One attempt to prove that a phone number belongs to a user. It holds neither number nor code."""

    id: UUID
    user_id: str
    phone_hash: str = field(repr=False)
    phone_ciphertext: str = field(repr=False)
    phone_last4: str = field(repr=False)
    code_hash: str = field(repr=False)
    expires_at: datetime
    tries_left: int = TRIES
    created_at: datetime

    @classmethod
    def pose(cls, keys: Keyring, user_id: str, phone: str, at: datetime) -> "tuple[Challenge, CodeRequested]":
        """Return a challenge for a number in E.164, and the fact that its code is wanted.

        Errors: InvalidValue for a user id that is empty or not printable.
        """
        if not user_id.strip() or not user_id.isprintable():
            raise InvalidValue("a challenge belongs to a user: user_id is empty or not printable")
        id = uuid7()
        requested = CodeRequested(challenge_id=id, expires_at=at + LIFE, occurred_at=at)
        return cls(
            id=id,
            user_id=user_id,
            phone_hash=keys.phone_hash(phone),
            phone_ciphertext=keys.seal(phone, context=str(id)),
            phone_last4=phone[-4:],
            code_hash=hash_of(keys, id, code_for(keys, requested.event_id)),
            expires_at=requested.expires_at,
            created_at=at,
        ), requested

    def answer(self, code_hash: str, at: datetime) -> PhoneVerified | CodeRejected:
        """Judge one answer; a wrong one costs a try. Late or surplus answers raise."""
        if at >= self.expires_at:
            raise ChallengeExpired(self.id, self.expires_at)
        if self.tries_left == 0:
            raise NoTriesLeft(self.id)
        if not hmac.compare_digest(code_hash, self.code_hash):
            self.tries_left -= 1
            return CodeRejected(challenge_id=self.id, tries_left=self.tries_left, occurred_at=at)
        return PhoneVerified(challenge_id=self.id, user_id=self.user_id, occurred_at=at)

    def tries_at(self, at: datetime) -> int:
        """Return how many more answers it would judge."""
        return self.tries_left if at < self.expires_at else 0


def code_for(keys: Keyring, event_id: UUID) -> str:
    """Return the six digits that belong to a CodeRequested event.

    Derived instead of stored: whoever sends it a second time, after a crash or in a retry, sends the
    same code, and nobody can read it from the database.
    """
    digest = hmac.digest(keys.code_key, b"code " + event_id.bytes, hashlib.sha256)
    # 64 bits for a million codes: the least even code is favoured by less than one in 10**13.
    return f"{int.from_bytes(digest[:8], 'big') % 10**_CODE_DIGITS:0{_CODE_DIGITS}}"


def hash_of(keys: Keyring, challenge_id: UUID, code: str) -> str:
    """Return the keyed hash of an answer, as hex; bound to the challenge, so equal codes look different.

    Spaces are dropped: people type `123 456`.
    """
    digits = "".join(code.split()).encode(errors="replace")
    return hmac.new(keys.code_key, b"answer " + challenge_id.bytes + digits, hashlib.sha256).hexdigest()
