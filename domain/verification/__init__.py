"""Proof that a phone number belongs to a user, by a code sent to it."""

from domain.verification.challenge import (
    LIFE,
    TRIES,
    Challenge,
    ChallengeExpired,
    MalformedAnswer,
    NoTriesLeft,
    UnknownCodeRequest,
    code_for,
)
from domain.verification.events import CodeRejected, CodeRequested, PhoneVerified
from domain.verification.limits import (
    LIMITS,
    Allowance,
    CodeRequestedTooSoon,
    Limits,
    TooManyAnswers,
    TooManyCodesThisHour,
    TooManyCodesToday,
)
from domain.verification.phone import NotMobile
from domain.verification.repository import Challenges, VerifiedPhones
from domain.verification.service import answer_challenge, forget_user, purge_expired, request_code, tries_left

__all__ = [
    "LIFE",
    "LIMITS",
    "TRIES",
    "Allowance",
    "Challenge",
    "ChallengeExpired",
    "Challenges",
    "CodeRejected",
    "CodeRequested",
    "CodeRequestedTooSoon",
    "Limits",
    "MalformedAnswer",
    "NoTriesLeft",
    "NotMobile",
    "PhoneVerified",
    "TooManyAnswers",
    "TooManyCodesThisHour",
    "TooManyCodesToday",
    "UnknownCodeRequest",
    "VerifiedPhones",
    "answer_challenge",
    "code_for",
    "forget_user",
    "purge_expired",
    "request_code",
    "tries_left",
]
