"""What follows from the events of verification: a code on a phone, and tries that are shown rightly."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import select, text
from structlog.testing import capture_logs

from domain.verification import (
    Challenge,
    CodeRejected,
    CodeRequested,
    PhoneVerified,
    answer_challenge,
    request_code,
)
from dovecote.database import Sessions
from dovecote.events.ids import uuid7
from dovecote.outbox import outbox
from dovecote.privacy import CannotDecrypt, Keyring
from dovecote.unit_of_work import unit_of_work
from workers.gateways import ChallengeCache, Gateways, GatewayUnavailable
from workers.handlers.verification import send_code, update_cache

pytestmark = pytest.mark.servers

PHONE = "+4915112345678"
KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)


@pytest.fixture(autouse=True)
def nothing_was_used_up(sessions: Sessions) -> None:
    """The tests share a number; what may be had of it is the subject of tests/security/test_codes.py."""
    with sessions.begin() as session:
        session.execute(text("delete from dovecote.verification_quotas"))


class Phone:
    """A gateway that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.fails = False

    def send(self, to: str, text: str, *, idempotency_key: str) -> None:
        if self.fails:
            raise GatewayUnavailable("not now")
        self.asked.append((to, text, idempotency_key))

    @property
    def code(self) -> str:
        (code,) = re.findall(r"\b\d{6}\b", self.asked[-1][1])
        return str(code)


class Cache(ChallengeCache):
    """A cache that remembers in memory."""

    def __init__(self) -> None:
        super().__init__(None, "test")
        self.known: dict[UUID, int] = {}

    def remember(self, challenge_id: UUID, tries_left: int, expires_at: datetime) -> None:
        self.known[challenge_id] = tries_left

    def forget(self, challenge_id: UUID) -> None:
        self.known.pop(challenge_id, None)


@pytest.fixture
def phone() -> Phone:
    return Phone()


@pytest.fixture
def cache() -> Cache:
    return Cache()


@pytest.fixture
def gateways(phone: Phone, cache: Cache) -> Gateways:
    return Gateways(sms=phone, challenges=cache, keys=KEYS)


def a_request(sessions: Sessions, at: datetime | None = None) -> tuple[Challenge, CodeRequested]:
    with unit_of_work(sessions) as uow:
        challenge = request_code(uow, KEYS, f"user-{uuid7()}", PHONE, at or datetime.now(UTC))
    with sessions() as session:
        row = session.execute(
            select(outbox.c.id, outbox.c.payload).where(outbox.c.aggregate_id == str(challenge.id))
        ).one()
    return challenge, CodeRequested.from_payload(row.id, row.payload)


def send(sessions: Sessions, requested: CodeRequested, gateways: Gateways) -> None:
    with unit_of_work(sessions) as uow:
        send_code(requested, uow, gateways)


def answer(sessions: Sessions, challenge: Challenge, code: str) -> PhoneVerified | CodeRejected:
    with unit_of_work(sessions) as uow:
        return answer_challenge(uow, KEYS, challenge.id, code, datetime.now(UTC), user_id=challenge.user_id)


def update(sessions: Sessions, event: PhoneVerified | CodeRejected, gateways: Gateways) -> None:
    with unit_of_work(sessions) as uow:
        update_cache(event, uow, gateways)


def test_the_code_on_the_phone_is_the_one_that_is_right(
    sessions: Sessions, phone: Phone, cache: Cache, gateways: Gateways
) -> None:
    challenge, requested = a_request(sessions)

    send(sessions, requested, gateways)

    ((to, _, key),) = phone.asked
    assert (to, key) == (PHONE, str(requested.event_id))
    assert cache.known == {challenge.id: 3}
    assert isinstance(answer(sessions, challenge, phone.code), PhoneVerified)


def test_a_code_sent_again_is_the_same_message_under_the_same_key(
    sessions: Sessions, phone: Phone, gateways: Gateways
) -> None:
    _, requested = a_request(sessions)

    send(sessions, requested, gateways)
    send(sessions, requested, gateways)

    assert phone.asked[0] == phone.asked[1]


def test_a_phone_that_cannot_be_reached_is_for_the_retry(
    sessions: Sessions, phone: Phone, cache: Cache, gateways: Gateways
) -> None:
    _, requested = a_request(sessions)
    phone.fails = True

    with pytest.raises(GatewayUnavailable):
        send(sessions, requested, gateways)

    assert cache.known == {}


def test_nothing_is_sent_for_a_challenge_that_is_over(sessions: Sessions, phone: Phone, gateways: Gateways) -> None:
    _, expired = a_request(sessions, datetime.now(UTC) - timedelta(minutes=5))
    unknown = CodeRequested(challenge_id=uuid7(), expires_at=expired.expires_at, occurred_at=expired.occurred_at)
    challenge, used_up = a_request(sessions)
    for _ in range(3):
        answer(sessions, challenge, "000000")

    for requested in (expired, unknown, used_up):
        with capture_logs() as logged:
            send(sessions, requested, gateways)
        assert [entry["challenge_id"] for entry in logged] == [str(requested.challenge_id)]

    assert phone.asked == []


def test_nothing_is_sent_for_a_challenge_that_was_replaced(
    sessions: Sessions, phone: Phone, gateways: Gateways
) -> None:
    challenge, older = a_request(sessions, datetime.now(UTC) - timedelta(minutes=1))
    with unit_of_work(sessions) as uow:
        request_code(uow, KEYS, challenge.user_id, PHONE, datetime.now(UTC))

    send(sessions, older, gateways)

    assert phone.asked == []


def test_an_answer_does_not_wait_for_a_slow_provider(sessions: Sessions, phone: Phone, gateways: Gateways) -> None:
    challenge, requested = a_request(sessions)

    with unit_of_work(sessions) as uow:
        send_code(requested, uow, gateways)
        verdict = answer(sessions, challenge, phone.code)

    assert isinstance(verdict, PhoneVerified)


def test_a_number_encrypted_with_a_key_that_is_gone_is_trouble_and_not_shown(
    sessions: Sessions, phone: Phone, gateways: Gateways
) -> None:
    _, requested = a_request(sessions)
    other_keys = replace(KEYS, encryption_keys={"k2": b"x" * 32}, current="k2")

    with pytest.raises(CannotDecrypt, match="'k1'") as trouble:
        send(sessions, requested, Gateways(sms=gateways.sms, challenges=gateways.challenges, keys=other_keys))

    assert PHONE not in str(trouble.value)
    assert phone.asked == []


def test_the_cache_follows_every_answer(sessions: Sessions, phone: Phone, cache: Cache, gateways: Gateways) -> None:
    challenge, requested = a_request(sessions)
    send(sessions, requested, gateways)

    update(sessions, answer(sessions, challenge, "000000"), gateways)
    assert cache.known == {challenge.id: 2}

    update(sessions, answer(sessions, challenge, phone.code), gateways)
    assert cache.known == {}


def test_an_event_that_comes_late_shows_what_is_true_now(sessions: Sessions, cache: Cache, gateways: Gateways) -> None:
    challenge, _ = a_request(sessions)
    first = answer(sessions, challenge, "000000")
    answer(sessions, challenge, "000000")

    update(sessions, first, gateways)

    assert cache.known == {challenge.id: 1}


def test_neither_number_nor_code_is_logged(sessions: Sessions, phone: Phone, gateways: Gateways) -> None:
    challenge, requested = a_request(sessions)

    with capture_logs() as logged:
        send(sessions, requested, gateways)
        send(sessions, requested, gateways)
        update(sessions, answer(sessions, challenge, phone.code), gateways)
        send(sessions, requested, gateways)

    logs = repr(logged)
    assert str(challenge.id) in logs
    assert PHONE.lstrip("+") not in logs
    assert not re.search(rf"\b{phone.code}\b", logs)
