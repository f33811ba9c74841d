"""Proof that a phone number belongs to a user, by a code sent to it."""

from domain.verification.challenge import (
    LIFE,
    TRIES,
    Challenge,
    ChallengeExpired,
    NoTriesLeft,
    code_for,
)
from domain.verification.events import CodeRejected, CodeRequested, PhoneVerified
from domain.verification.repository import Challenges, VerifiedPhones
from domain.verification.service import answer_challenge, purge_expired, request_code, tries_left

__all__ = [
    "LIFE",
    "TRIES",
    "Challenge",
    "ChallengeExpired",
    "Challenges",
    "CodeRejected",
    "CodeRequested",
    "NoTriesLeft",
    "PhoneVerified",
    "VerifiedPhones",
    "answer_challenge",
    "code_for",
    "purge_expired",
    "request_code",
    "tries_left",
]
