"""The use cases of verification against a real Postgres: one success, three tries, nothing in the clear."""

import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from domain.verification import (
    Challenge,
    ChallengeExpired,
    Challenges,
    CodeRejected,
    CodeRequestedTooSoon,
    NoTriesLeft,
    PhoneVerified,
    VerifiedPhones,
    answer_challenge,
    code_for,
    purge_expired,
    request_code,
    tries_left,
)
from domain.verification.phone import phone_hash
from domain.verification.repository import challenges
from dovecote.database import Sessions
from dovecote.errors import InvalidValue, NotFound
from dovecote.events.ids import uuid7
from dovecote.outbox import outbox
from dovecote.privacy import Keyring
from dovecote.unit_of_work import UnitOfWork, unit_of_work

pytestmark = pytest.mark.servers

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
AFTER = NOON + timedelta(minutes=5)
LATER = NOON + timedelta(seconds=30)
PHONE = "+4915112345678"
WRONG = "000000"  # one challenge in a million has this code
KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)


@pytest.fixture
def user() -> str:
    return f"user-{uuid7()}"


@pytest.fixture(autouse=True)
def nothing_was_used_up(sessions: Sessions) -> None:
    """The tests share a number; what may be had of it is the subject of tests/security/test_codes.py."""
    with sessions.begin() as session:
        session.execute(text("delete from dovecote.verification_quotas"))


def a_request(sessions: Sessions, user: str, phone: str = PHONE, at: datetime = NOON) -> UUID:
    with unit_of_work(sessions) as uow:
        return request_code(uow, KEYS, user, phone, at).id


def the_code(sessions: Sessions, challenge_id: UUID) -> str:
    with sessions() as session:
        event_id = session.scalars(
            select(outbox.c.id).where(
                outbox.c.aggregate_id == str(challenge_id),
                outbox.c.event_type == "verification.code_requested.v1",
            )
        ).one()
    return code_for(KEYS, event_id)


def answer(
    sessions: Sessions, user: str, challenge_id: UUID, code: str, at: datetime = NOON
) -> PhoneVerified | CodeRejected:
    with unit_of_work(sessions) as uow:
        return answer_challenge(uow, KEYS, challenge_id, code, at, user_id=user)


def answer_rightly(sessions: Sessions, user: str, challenge_id: UUID) -> PhoneVerified | CodeRejected:
    return answer(sessions, user, challenge_id, the_code(sessions, challenge_id))


def tries(sessions: Sessions, challenge_id: UUID, at: datetime = NOON) -> int:
    with unit_of_work(sessions) as uow:
        return tries_left(uow, challenge_id, at)


def events_of(sessions: Sessions, challenge_id: UUID) -> list[str]:
    with sessions() as session:
        return list(
            session.scalars(
                select(outbox.c.event_type)
                .where(outbox.c.aggregate_type == "challenge", outbox.c.aggregate_id == str(challenge_id))
                .order_by(outbox.c.position)
            )
        )


def open_challenges_of(sessions: Sessions, user: str) -> list[UUID]:
    with sessions() as session:
        return list(session.scalars(select(challenges.c.id).where(challenges.c.user_id == user)))


# Requesting -----------------------------------------------------------------------------------


def test_every_field_of_a_challenge_comes_back(sessions: Sessions, user: str) -> None:
    with unit_of_work(sessions) as uow:
        issued = request_code(uow, KEYS, user, PHONE, NOON)

    with unit_of_work(sessions) as uow:
        stored = Challenges(uow).get(issued.id)

    assert stored is not issued
    for column in challenges.columns:
        assert getattr(stored, column.name) == getattr(issued, column.name), column.name


def test_a_request_is_recorded_without_the_number(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)

    with sessions() as session:
        payload = session.scalars(select(outbox.c.payload).where(outbox.c.aggregate_id == str(challenge_id))).one()

    assert set(payload) == {"challenge_id", "expires_at", "occurred_at"}


def test_a_number_that_is_none_leaves_nothing_behind(sessions: Sessions, user: str) -> None:
    with pytest.raises(InvalidValue, match="phone number"):
        a_request(sessions, user, phone="0151 12345678")

    assert open_challenges_of(sessions, user) == []


def test_a_newer_request_for_the_same_number_ends_the_older(sessions: Sessions, user: str) -> None:
    older = a_request(sessions, user, "+49 151 12345678")
    old_code = the_code(sessions, older)
    newer = a_request(sessions, user, "+4915112345678", LATER)

    with pytest.raises(NotFound):
        answer(sessions, user, older, old_code)

    assert open_challenges_of(sessions, user) == [newer]
    assert isinstance(answer_rightly(sessions, user, newer), PhoneVerified)


def test_requests_for_two_numbers_or_by_two_users_stand_side_by_side(sessions: Sessions, user: str) -> None:
    other = f"{user}-too"
    requested = [
        (user, a_request(sessions, user, PHONE)),
        (user, a_request(sessions, user, "+4915112345679", LATER)),
        (other, a_request(sessions, other, PHONE, LATER)),
    ]

    assert all(isinstance(answer_rightly(sessions, who, which), PhoneVerified) for who, which in requested)


def test_of_two_requests_at_the_same_time_the_second_is_refused(sessions: Sessions, user: str) -> None:
    at_once = threading.Barrier(2)
    outcomes: list[object] = []

    def request() -> None:
        try:
            with unit_of_work(sessions) as uow:
                at_once.wait(10)
                outcomes.append(request_code(uow, KEYS, user, PHONE, NOON).id)
        except CodeRequestedTooSoon as refusal:
            outcomes.append(refusal.retry_after)

    threads = [threading.Thread(target=request) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    (kept,) = open_challenges_of(sessions, user)
    assert sorted(outcomes, key=str) == sorted([kept, timedelta(seconds=30)], key=str)


def test_a_wrong_answer_and_a_new_request_may_share_a_transaction(sessions: Sessions, user: str) -> None:
    older = a_request(sessions, user)

    with unit_of_work(sessions) as uow:
        answer_challenge(uow, KEYS, older, WRONG, NOON, user_id=user)
        newer = request_code(uow, KEYS, user, PHONE, LATER).id

    assert open_challenges_of(sessions, user) == [newer]
    assert tries(sessions, newer) == 3


# Answering ------------------------------------------------------------------------------------


def test_a_right_answer_proves_the_phone_and_cleans_up(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)

    verdict = answer_rightly(sessions, user, challenge_id)

    assert isinstance(verdict, PhoneVerified)
    assert open_challenges_of(sessions, user) == []
    assert events_of(sessions, challenge_id) == [
        "verification.code_requested.v1",
        "verification.phone_verified.v1",
    ]
    with unit_of_work(sessions) as uow:
        assert VerifiedPhones(uow).verified_at(user, phone_hash(KEYS, PHONE)) == NOON


def test_a_second_right_answer_finds_nothing(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)
    code = the_code(sessions, challenge_id)
    answer(sessions, user, challenge_id, code)

    with pytest.raises(NotFound, match=str(challenge_id)):
        answer(sessions, user, challenge_id, code)


def test_a_number_can_be_proven_again(sessions: Sessions, user: str) -> None:
    later = NOON + timedelta(days=1)
    answer_rightly(sessions, user, a_request(sessions, user))
    again = a_request(sessions, user, at=later)

    answer(sessions, user, again, the_code(sessions, again), later)

    with unit_of_work(sessions) as uow:
        assert VerifiedPhones(uow).verified_at(user, phone_hash(KEYS, PHONE)) == later


def test_the_try_a_wrong_answer_costs_is_committed(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)

    verdict = answer(sessions, user, challenge_id, WRONG)

    assert isinstance(verdict, CodeRejected)
    assert tries(sessions, challenge_id) == verdict.tries_left == 2
    assert events_of(sessions, challenge_id)[1:] == ["verification.code_rejected.v1"]


def test_after_three_wrong_answers_the_right_one_is_refused(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)
    for _ in range(3):
        answer(sessions, user, challenge_id, WRONG)

    with pytest.raises(NoTriesLeft):
        answer_rightly(sessions, user, challenge_id)

    assert tries(sessions, challenge_id) == 0
    assert len(events_of(sessions, challenge_id)) == 4
    with unit_of_work(sessions) as uow:
        assert VerifiedPhones(uow).verified_at(user, phone_hash(KEYS, PHONE)) is None


def test_a_late_answer_is_refused_and_costs_nothing(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)

    for code in (WRONG, the_code(sessions, challenge_id)):
        with pytest.raises(ChallengeExpired):
            answer(sessions, user, challenge_id, code, AFTER)

    assert tries(sessions, challenge_id) == 3
    assert events_of(sessions, challenge_id) == ["verification.code_requested.v1"]


def test_many_answers_at_once_cost_three_tries_and_no_more(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)
    verdicts: list[object] = []
    at_once = threading.Barrier(8)

    def guess() -> None:
        at_once.wait(10)
        try:
            verdicts.append(answer(sessions, user, challenge_id, WRONG))
        except NoTriesLeft as refusal:
            verdicts.append(refusal)

    threads = [threading.Thread(target=guess) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    left = sorted(verdict.tries_left for verdict in verdicts if isinstance(verdict, CodeRejected))
    assert left == [0, 1, 2]
    assert len(verdicts) == 8


def test_of_many_right_answers_at_once_one_succeeds(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)
    code = the_code(sessions, challenge_id)
    verdicts: list[object] = []
    at_once = threading.Barrier(4)

    def answer_it() -> None:
        at_once.wait(10)
        try:
            verdicts.append(answer(sessions, user, challenge_id, code))
        except NotFound as refusal:
            verdicts.append(refusal)

    threads = [threading.Thread(target=answer_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert [type(verdict) for verdict in verdicts].count(PhoneVerified) == 1
    assert [type(verdict) for verdict in verdicts].count(NotFound) == 3


def test_an_answer_locks_its_challenge_until_the_end(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)

    with unit_of_work(sessions) as uow, sessions() as session:
        answer_challenge(uow, KEYS, challenge_id, WRONG, NOON, user_id=user)
        session.execute(text("set local lock_timeout = '50ms'"))
        with pytest.raises(OperationalError, match="lock timeout"):
            answer_challenge(UnitOfWork(session), KEYS, challenge_id, WRONG, NOON, user_id=user)

    assert tries(sessions, challenge_id) == 2


def test_two_answers_in_one_transaction_cost_two_tries(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)

    with unit_of_work(sessions) as uow:
        answer_challenge(uow, KEYS, challenge_id, WRONG, NOON, user_id=user)
        answer_challenge(uow, KEYS, challenge_id, WRONG, NOON, user_id=user)

    assert tries(sessions, challenge_id) == 1


def test_an_answer_is_judged_by_what_is_true_under_the_lock(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)

    with unit_of_work(sessions) as uow:
        looked_at = Challenges(uow).find(challenge_id)
        answer(sessions, user, challenge_id, WRONG)
        answer_challenge(uow, KEYS, challenge_id, WRONG, NOON, user_id=user)
        assert looked_at is not None
        assert looked_at.tries_left == 1

    assert tries(sessions, challenge_id) == 1


# Asking and purging ---------------------------------------------------------------------------


def test_an_expired_answered_or_unknown_challenge_has_no_tries_left(sessions: Sessions, user: str) -> None:
    expired = a_request(sessions, user)
    answered = a_request(sessions, user, "+4915112345679", LATER)
    answer_rightly(sessions, user, answered)

    assert tries(sessions, expired, AFTER) == 0
    assert tries(sessions, answered) == 0
    assert tries(sessions, uuid7()) == 0


def test_a_challenge_is_purged_a_day_after_it_expired(sessions: Sessions, user: str) -> None:
    challenge_id = a_request(sessions, user)
    a_day_later = AFTER + timedelta(days=1)

    with unit_of_work(sessions) as uow:
        purge_expired(uow, a_day_later)
    assert open_challenges_of(sessions, user) == [challenge_id]

    with unit_of_work(sessions) as uow:
        assert purge_expired(uow, a_day_later + timedelta(seconds=1)) >= 1
    assert open_challenges_of(sessions, user) == []


# Rights and privacy ---------------------------------------------------------------------------


def test_a_worker_may_do_all_of_it(sessions: Sessions, user: str) -> None:
    as_worker = text("set local role dovecote_worker")
    with unit_of_work(sessions) as uow:
        uow.session.execute(as_worker)
        challenge_id = request_code(uow, KEYS, user, PHONE, NOON).id
        answer_challenge(uow, KEYS, challenge_id, WRONG, NOON, user_id=user)

    with unit_of_work(sessions) as uow:
        uow.session.execute(as_worker)
        code = the_code(sessions, challenge_id)
        verdict = answer_challenge(uow, KEYS, challenge_id, code, NOON, user_id=user)
        purge_expired(uow, NOON)

    assert isinstance(verdict, PhoneVerified)


@pytest.mark.parametrize("column", ["phone_ciphertext", "code_hash", "*"])
def test_an_operator_cannot_read_the_encrypted_number_or_the_code(sessions: Sessions, column: str) -> None:
    with sessions() as session:
        session.execute(text("set local role dovecote_operator"))
        with pytest.raises(ProgrammingError, match="permission denied"):
            session.execute(text(f"select {column} from dovecote.challenges"))


def test_an_operator_can_see_challenges(sessions: Sessions, user: str) -> None:
    a_request(sessions, user)

    with sessions() as session:
        session.execute(text("set local role dovecote_operator"))
        seen = session.execute(
            text("select phone_last4, tries_left from dovecote.challenges where user_id = :user"),
            {"user": user},
        ).one()

    assert seen == ("5678", 3)


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("phone_ciphertext = '+4915112345678'", "challenges_phone_is_encrypted"),
        ("phone_hash = '+4915112345678'", "challenges_phone_hash_is_a_sha_256"),
        ("code_hash = '123456'", "challenges_code_hash_is_a_sha_256"),
        ("phone_last4 = '45678'", "challenges_phone_last4_is_four_digits"),
        ("tries_left = -1", "challenges_tries_are_not_negative"),
        ("expires_at = created_at", "challenges_expire_after_they_begin"),
    ],
)
def test_the_table_refuses_a_number_or_a_code_in_the_clear(
    sessions: Sessions, user: str, change: str, constraint: str
) -> None:
    a_request(sessions, user)

    with pytest.raises(IntegrityError, match=constraint), sessions.begin() as session:
        session.execute(text(f"update dovecote.challenges set {change} where user_id = :user"), {"user": user})


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "sqlalchemy.engine"):
        yield caplog


def test_neither_number_nor_code_is_in_any_row_or_any_log(
    sessions: Sessions, user: str, everything_logged: pytest.LogCaptureFixture
) -> None:
    phone = "+4915112345670"
    answered, left_open = a_request(sessions, user, phone), a_request(sessions, f"{user}-too", phone, LATER)
    codes = [the_code(sessions, challenge_id) for challenge_id in (answered, left_open)]
    answer(sessions, user, answered, WRONG)
    answer(sessions, f"{user}-too", left_open, WRONG)
    answer(sessions, user, answered, codes[0])
    with pytest.raises(InvalidValue):
        a_request(sessions, user, phone + "0000000000")

    rows = everything_stored(sessions)
    logs = everything_logged.text

    assert str(left_open) in rows
    assert str(left_open) in logs
    for secret in (phone.lstrip("+"), phone.removeprefix("+49")):
        assert secret not in rows
        assert secret not in logs
    for code in codes:
        assert f'"{code}"' not in rows
        assert f"'{code}'" not in logs


def everything_stored(sessions: Sessions) -> str:
    with sessions() as session:
        tables = session.scalars(
            text(
                "select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace "
                "where n.nspname = 'dovecote' and c.relkind = 'r'"
            )
        ).all()
        return "\n".join(
            row for table in tables for row in session.scalars(text(f"select to_jsonb(t)::text from {table} t"))
        )


def test_the_hidden_parts_of_a_challenge_are_not_in_its_text(sessions: Sessions, user: str) -> None:
    with unit_of_work(sessions) as uow:
        challenge: Challenge = Challenges(uow).get(a_request(sessions, user))

        assert challenge.phone_ciphertext not in repr(challenge)
        assert challenge.phone_hash not in repr(challenge)
