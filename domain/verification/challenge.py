"""One attempt to prove a phone number: how its code comes about and how an answer is judged."""

import hashlib
import hmac
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

from domain.verification.events import CodeRejected, CodeRequested, PhoneVerified
from domain.verification.phone import phone_hash
from dovecote.errors import DomainError, InvalidValue, Refused
from dovecote.events.ids import uuid7
from dovecote.privacy import Keyring

# What one challenge allows. Limits over several challenges are in limits.py.
LIFE = timedelta(minutes=5)
TRIES = 3
_CODE_DIGITS = 6
# A code with a separator and a mark around each digit is shorter. What is longer is not looked at.
_MAX_TYPED_CHARACTERS = 64
# It becomes part of keys and indexes; Postgres takes 2,700 bytes in one.
_MAX_USER_ID_CHARACTERS = 255


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


class MalformedAnswer(InvalidValue):
    """What was typed is not six digits. It was not judged and costs no try: ask for the code again."""

    def __init__(self) -> None:
        super().__init__(f"a code is {_CODE_DIGITS} digits; this answer is something else and was not judged")


class UnknownCodeRequest(DomainError):
    """An event asks for a code and is not the one that issued its challenge. Nothing is sent for it: discard it."""

    def __init__(self, challenge_id: UUID, event_id: UUID) -> None:
        super().__init__(
            f"event {event_id} asks for the code of challenge {challenge_id} and did not issue it: some other writer "
            "wrote or changed it, or the code key was changed meanwhile. Nothing was sent; find out who wrote the "
            "event, then discard it"
        )
        self.challenge_id = challenge_id
        self.event_id = event_id


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
    def issue(cls, keys: Keyring, user_id: str, phone: str, at: datetime) -> "tuple[Challenge, CodeRequested]":
        """Return a challenge for a number in E.164, and the event that requests its code.

        Errors: InvalidValue for a user id that is empty, not printable or longer than 255 characters.
        """
        if not user_id.strip() or not user_id.isprintable() or len(user_id) > _MAX_USER_ID_CHARACTERS:
            raise InvalidValue(
                "a challenge belongs to a user: user_id is empty, not printable or longer than "
                f"{_MAX_USER_ID_CHARACTERS} characters"
            )
        id = uuid7()
        requested = CodeRequested(challenge_id=id, expires_at=at + LIFE, occurred_at=at)
        return cls(
            id=id,
            user_id=user_id,
            phone_hash=phone_hash(keys, phone),
            phone_ciphertext=keys.encrypt(phone, context=str(id)),
            phone_last4=phone[-4:],
            code_hash=hash_of(keys, id, code_for(keys, requested.event_id)),
            expires_at=requested.expires_at,
            created_at=at,
        ), requested

    def answer(self, code_hash: str, at: datetime) -> PhoneVerified | CodeRejected:
        """Judge one answer; a wrong one costs a try. Late or surplus answers raise."""
        self.require_open(at)
        if not hmac.compare_digest(code_hash, self.code_hash):
            self.tries_left -= 1
            return CodeRejected(challenge_id=self.id, tries_left=self.tries_left, occurred_at=at)
        return PhoneVerified(challenge_id=self.id, user_id=self.user_id, occurred_at=at)

    def require_open(self, at: datetime) -> None:
        """Do nothing if an answer would be judged. Errors: ChallengeExpired, NoTriesLeft."""
        if at >= self.expires_at:
            raise ChallengeExpired(self.id, self.expires_at)
        if self.tries_left == 0:
            raise NoTriesLeft(self.id)

    def code_of(self, keys: Keyring, event_id: UUID) -> str:
        """Return the code to send for an event, if that event issued this challenge.

        Anybody who writes events can write one with the id of a challenge. Its code would be another one: sent to
        the phone it would be wrong, and sent to somebody else's phone it must not be right.
        Errors: UnknownCodeRequest.
        """
        code = code_for(keys, event_id)
        if not hmac.compare_digest(hash_of(keys, self.id, code), self.code_hash):
            raise UnknownCodeRequest(self.id, event_id)
        return code

    def tries_at(self, at: datetime) -> int:
        """Return how many more answers it would judge."""
        return self.tries_left if at < self.expires_at else 0


def code_for(keys: Keyring, event_id: UUID) -> str:
    """Return the six digits that belong to a CodeRequested event.

    Derived instead of stored: a second send, after a crash or in a retry, sends the same code, and it
    cannot be read from the database.
    """
    digest = hmac.digest(keys.code_key, b"code " + event_id.bytes, hashlib.sha256)
    # 64 bits for a million codes: the modulo bias is below 1e-13.
    return f"{int.from_bytes(digest[:8], 'big') % 10**_CODE_DIGITS:0{_CODE_DIGITS}}"


def hash_of(keys: Keyring, challenge_id: UUID, code: str) -> str:
    """Return the keyed hash of a code, as hex; bound to the challenge, so equal codes look different."""
    return hmac.new(keys.code_key, b"answer " + challenge_id.bytes + code.encode(), hashlib.sha256).hexdigest()


def typed_code(answer: str) -> str:
    """Return the six digits that a user typed, as ASCII.

    People type `123 456`, `123-456`, copy a full stop along, or have a keyboard with other digits; phones add
    invisible marks. Digits of any script count; spaces, dashes, full stops and invisible characters do not.
    Errors: MalformedAnswer for anything else.
    """
    if len(answer) > _MAX_TYPED_CHARACTERS:
        raise MalformedAnswer
    digits = [_digit(character) for character in answer if not _is_separator(character)]
    if len(digits) != _CODE_DIGITS:
        raise MalformedAnswer
    return "".join(digits)


def _is_separator(character: str) -> bool:
    # Zs: spaces; Pd: dashes; Cf: what is invisible, such as direction marks and zero-width spaces.
    return character in ".\u2212" or character.isspace() or unicodedata.category(character) in ("Zs", "Pd", "Cf")


def _digit(character: str) -> str:
    value = unicodedata.decimal(character, None)
    if value is None:
        raise MalformedAnswer
    return str(value)
