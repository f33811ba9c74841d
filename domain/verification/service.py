"""The use cases of verification. The code itself is sent by a consumer: nothing is sent from here.

Requests and answers are counted, by number and by user (limits.py). The counts are taken under a row lock, the
number's before the user's, and commit with what they count: show no verdict before its transaction is committed. Two
transactions with several of these use cases may deadlock; `run_unit_of_work` runs one of them again.
"""

from datetime import datetime, timedelta
from uuid import UUID

from domain.verification.challenge import Challenge, hash_of, typed_code
from domain.verification.events import CodeRejected, PhoneVerified
from domain.verification.limits import LIMITS, LONGEST_WINDOW, Limits, require_answer, require_code
from domain.verification.phone import mobile_number
from domain.verification.repository import Challenges, Quotas, VerifiedPhones
from dovecote.privacy import Keyring
from dovecote.unit_of_work import UnitOfWork

# So long a late answer hears "expired" instead of "there is no such challenge".
_KEPT_AFTER_EXPIRY = timedelta(days=1)
# Rows of one transaction of `purge_expired`: some 20 ms.
_PURGED_AT_ONCE = 1_000


def request_code(
    uow: UnitOfWork, keys: Keyring, user_id: str, phone: str, at: datetime, *, limits: Limits = LIMITS
) -> Challenge:
    """Issue a challenge for a mobile number in international format; an older one for the same number ends.

    A refusal writes nothing, sends nothing, counts nothing, and leaves an open challenge as it is: after a double
    click the first code works.
    Errors: NotMobile and InvalidValue, without the number; CodeRequestedTooSoon, TooManyCodesThisHour,
            TooManyCodesToday and TooManyAnswers, all RateLimited with `retry_after`; MissingPackage without
            `dovecote[privacy]`.
    """
    challenge, requested = Challenge.issue(keys, user_id, mobile_number(phone), at)
    quotas = Quotas(uow)
    # A savepoint: where the caller goes on after a refusal, no empty count is committed.
    with uow.session.begin_nested():
        counted = quotas.lock(challenge.phone_hash, user_id, limits, at)
        require_code(counted, at)
    for quota in counted:
        quota.count_code(at)
    quotas.save(counted)
    Challenges(uow).put(challenge)
    uow.emit(requested)
    return challenge


def answer_challenge(
    uow: UnitOfWork,
    keys: Keyring,
    challenge_id: UUID,
    code: str,
    at: datetime,
    *,
    user_id: str,
    limits: Limits = LIMITS,
) -> PhoneVerified | CodeRejected:
    """Judge an answer of a user to a challenge of their own and return the verdict.

    user_id  who is answering, from the session, never from the form: a challenge of another user is not found
    A wrong answer is a verdict, not an error: its try must be committed, and an error would roll it back. Whatever
    raises was not judged and costs nothing.
    Errors: MalformedAnswer for anything but six digits; NotFound; ChallengeExpired; NoTriesLeft; TooManyAnswers,
            which is RateLimited with `retry_after`.
    """
    digits = typed_code(code)
    challenges, quotas = Challenges(uow), Quotas(uow)
    known = challenges.of_user(challenge_id, user_id)
    with uow.session.begin_nested():
        counted = quotas.lock(known.phone_hash, user_id, limits, at)
        challenge = challenges.get(challenge_id)
        challenge.require_open(at)
        require_answer(counted, at)
    for quota in counted:
        quota.count_answer(at)
    quotas.save(counted)
    verdict = challenge.answer(hash_of(keys, challenge_id, digits), at)
    if isinstance(verdict, PhoneVerified):
        VerifiedPhones(uow).add(challenge.user_id, challenge.phone_hash, at)
        challenges.remove(challenge)
    uow.emit(verdict)
    return verdict


def tries_left(uow: UnitOfWork, challenge_id: UUID, at: datetime, *, limits: Limits = LIMITS) -> int:
    """Return how many more answers would be judged: 0 once it has expired, was answered or replaced, or in a
    lock-out."""
    challenge = Challenges(uow).find(challenge_id)
    if challenge is None:
        return 0
    counted = Quotas(uow).find(challenge.phone_hash, challenge.user_id, limits)
    return min(challenge.tries_at(at), *(quota.answers_left(at) for quota in counted))


def purge_expired(uow: UnitOfWork, at: datetime) -> int:
    """Remove challenges that expired more than a day ago, with their encrypted numbers, and counts that are older
    than any limit looks back, which is a day too. Return how many rows that were.

    At most 1,000 of each: call it, each time in a transaction of its own, until it returns 0. The relay does, once
    an hour, and so does `dovecote maintain`.
    """
    expired = Challenges(uow).remove_expired(at - _KEPT_AFTER_EXPIRY, _PURGED_AT_ONCE)
    return expired + Quotas(uow).remove_idle(at - LONGEST_WINDOW, _PURGED_AT_ONCE)


def forget_user(uow: UnitOfWork, user_id: str) -> int:
    """Remove what is known of a user's numbers, proven or not, and return how many rows that were.

    What counts for the limits stays until it is a day old: otherwise this would be the way around them.
    """
    return Challenges(uow).remove_of(user_id) + VerifiedPhones(uow).remove_of(user_id)
