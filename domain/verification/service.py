"""The stories of verification. The code itself is sent by a consumer: nothing is sent from here."""

from datetime import datetime, timedelta
from uuid import UUID

from domain.privacy import Keyring, parse_phone
from domain.unit_of_work import UnitOfWork
from domain.verification.challenge import Challenge, hash_of
from domain.verification.events import CodeRejected, PhoneVerified
from domain.verification.repository import Challenges, VerifiedPhones

# So long a late answer hears "expired" instead of "there is no such challenge".
_KEPT_AFTER_EXPIRY = timedelta(days=1)


def request_code(uow: UnitOfWork, keys: Keyring, user_id: str, phone: str, at: datetime) -> Challenge:
    """Pose a challenge for a number in international format; an older one for the same number ends.

    Errors: InvalidValue, without the number, if it is none; MissingPackage without `dovecote[privacy]`.
    """
    challenge, requested = Challenge.pose(keys, user_id, parse_phone(phone), at)
    Challenges(uow).put(challenge)
    uow.emit(requested)
    return challenge


def answer_challenge(
    uow: UnitOfWork, keys: Keyring, challenge_id: UUID, code: str, at: datetime
) -> PhoneVerified | CodeRejected:
    """Judge an answer and return the verdict. A wrong answer is a verdict, not an error: its try must be
    committed, and an error would roll it back.

    Errors: NotFound, ChallengeExpired, NoTriesLeft.
    """
    open_challenges = Challenges(uow)
    challenge = open_challenges.get(challenge_id)
    verdict = challenge.answer(hash_of(keys, challenge_id, code), at)
    if isinstance(verdict, PhoneVerified):
        VerifiedPhones(uow).add(challenge.user_id, challenge.phone_hash, at)
        open_challenges.remove(challenge)
    uow.emit(verdict)
    return verdict


def tries_left(uow: UnitOfWork, challenge_id: UUID, at: datetime) -> int:
    """Return how many more answers would be judged: 0 once it has expired, was answered or replaced."""
    challenge = Challenges(uow).find(challenge_id)
    return challenge.tries_at(at) if challenge else 0


def purge_expired(uow: UnitOfWork, at: datetime) -> int:
    """Remove challenges that expired more than a day ago and return how many that were."""
    return Challenges(uow).remove_expired(at - _KEPT_AFTER_EXPIRY)
