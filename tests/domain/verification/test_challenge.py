"""How a challenge judges answers, and how its code comes about. No database."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.verification import (
    LIFE,
    TRIES,
    Challenge,
    ChallengeExpired,
    CodeRejected,
    CodeRequested,
    MalformedAnswer,
    NoTriesLeft,
    PhoneVerified,
    code_for,
)
from domain.verification.challenge import hash_of, typed_code
from domain.verification.phone import phone_hash
from dovecote.errors import InvalidValue
from dovecote.events import Event, read_event
from dovecote.events.ids import uuid7
from dovecote.privacy import Keyring

EXAMPLES = Path(__file__).parents[2] / "contracts" / "examples"
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
PHONE = "+4915112345678"
KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)
OTHER_KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"d" * 32)


def a_challenge() -> tuple[Challenge, str]:
    challenge, requested = Challenge.issue(KEYS, "user-1", PHONE, NOON)
    return challenge, code_for(KEYS, requested.event_id)


def answer(challenge: Challenge, code: str, at: datetime = NOON) -> PhoneVerified | CodeRejected:
    return challenge.answer(hash_of(KEYS, challenge.id, typed_code(code)), at)


def wrong(code: str) -> str:
    return f"{(int(code) + 1) % 1_000_000:06}"


# Answers --------------------------------------------------------------------------------------


def test_the_right_code_proves_the_phone() -> None:
    challenge, code = a_challenge()

    verified = answer(challenge, code)

    assert isinstance(verified, PhoneVerified)
    assert (verified.challenge_id, verified.user_id) == (challenge.id, "user-1")


def test_a_wrong_code_costs_a_try() -> None:
    challenge, code = a_challenge()

    rejected = answer(challenge, wrong(code))

    assert isinstance(rejected, CodeRejected)
    assert rejected.tries_left == challenge.tries_left == TRIES - 1


def test_the_last_try_may_be_the_right_one() -> None:
    challenge, code = a_challenge()
    for _ in range(TRIES - 1):
        answer(challenge, wrong(code))

    assert isinstance(answer(challenge, code), PhoneVerified)


def test_after_three_wrong_codes_even_the_right_one_is_refused() -> None:
    challenge, code = a_challenge()
    for _ in range(3):
        answer(challenge, wrong(code))

    with pytest.raises(NoTriesLeft) as refusal:
        answer(challenge, code)

    assert refusal.value.challenge_id == challenge.id
    assert challenge.tries_at(NOON) == 0


def test_a_code_works_for_five_minutes_and_no_longer() -> None:
    (early, early_code), (late, late_code) = a_challenge(), a_challenge()
    end = NOON + timedelta(minutes=5)

    assert isinstance(answer(early, early_code, end - timedelta(microseconds=1)), PhoneVerified)
    with pytest.raises(ChallengeExpired) as refusal:
        answer(late, late_code, end)

    assert refusal.value.expired_at == end
    assert (late.tries_at(end), late.tries_left) == (0, TRIES)


# What is typed --------------------------------------------------------------------------------

DIGITS = {"Arabic-Indic": "٠", "Persian": "۰", "Devanagari": "०", "full width": "０", "mathematical": "𝟎"}


@pytest.mark.parametrize("zero", DIGITS.values(), ids=DIGITS)
def test_a_code_may_be_typed_in_the_digits_of_any_keyboard(zero: str) -> None:
    challenge, code = a_challenge()

    assert isinstance(answer(challenge, "".join(chr(ord(zero) + int(digit)) for digit in code)), PhoneVerified)


@pytest.mark.parametrize(
    "typed",
    [
        "123 456",
        " 123456\n",
        "123-456",
        "123\u2013456",
        "123\u00a0456",
        "\u200f123456",
        "12\u200b3456",
        "123456.",
        "1\t2 3\u202f4-5.6",
    ],
    ids=ascii,
)
def test_separators_and_what_is_invisible_do_not_count(typed: str) -> None:
    assert typed_code(typed) == "123456"


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "   ",
        "none",
        "12345",
        "1234567",
        "12345a",
        "\ud800",
        "\0" * 6,
        "²" * 6,
        "½" * 6,
        "一二三四五六",
        "+12345",
        "1" * 100_000,
        "123456" + " " * 59,
    ],
    ids=lambda typed: ascii(typed[:8]),
)
def test_what_is_no_code_is_not_judged(typed: str) -> None:
    with pytest.raises(MalformedAnswer, match="6 digits"):
        typed_code(typed)


@given(text=st.text(st.characters()) | st.text("0123456789 -\u200f٣"))
def test_whatever_is_typed_is_six_digits_or_malformed(text: str) -> None:
    try:
        digits = typed_code(text)
    except MalformedAnswer:
        return

    assert len(digits) == 6
    assert digits.isascii()
    assert digits.isdigit()


def test_answers_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []
    challenge, code = a_challenge()

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("domain.verification.challenge.hmac.compare_digest", compare)
    answer(challenge, code)

    assert compared == [(hash_of(KEYS, challenge.id, code), challenge.code_hash)]


# Codes ----------------------------------------------------------------------------------------


def test_the_code_of_an_event_never_changes() -> None:
    # A message that waits in the outbox while a new version is rolled out must carry the same code.
    assert code_for(KEYS, UUID("019cb0a1-7c00-7000-8000-000000000001")) == "377262"


@given(event_id=st.uuids())
def test_a_code_has_six_digits_and_is_always_the_same(event_id: UUID) -> None:
    code = code_for(KEYS, event_id)

    assert len(code) == 6
    assert code.isascii()
    assert code.isdigit()
    assert code == code_for(KEYS, event_id)


def test_codes_depend_on_the_secret_and_are_spread_out() -> None:
    event_ids = [uuid7() for _ in range(1_000)]

    codes = [code_for(KEYS, event_id) for event_id in event_ids]

    assert codes != [code_for(OTHER_KEYS, event_id) for event_id in event_ids]
    assert len(set(codes)) > 980
    assert {code[0] for code in codes} == set("0123456789")


def test_the_hash_of_a_code_is_bound_to_its_challenge_and_to_the_secret() -> None:
    here, there = uuid7(), uuid7()

    hashes = {hash_of(KEYS, here, "123456"), hash_of(KEYS, there, "123456"), hash_of(OTHER_KEYS, here, "123456")}

    assert len(hashes) == 3


# What it holds --------------------------------------------------------------------------------


def test_a_new_challenge_has_three_tries_and_five_minutes() -> None:
    challenge, requested = Challenge.issue(KEYS, "user-1", PHONE, NOON)

    assert (challenge.tries_left, challenge.created_at) == (3, NOON)
    assert challenge.expires_at == requested.expires_at == NOON + LIFE == NOON + timedelta(minutes=5)


def test_a_challenge_holds_the_number_encrypted_for_itself() -> None:
    challenge, _ = a_challenge()

    assert KEYS.decrypt(challenge.phone_ciphertext, context=str(challenge.id)) == PHONE
    assert challenge.phone_hash == phone_hash(KEYS, PHONE)
    assert challenge.phone_last4 == "5678"


def test_a_challenge_shows_neither_number_nor_code() -> None:
    challenge, code = a_challenge()

    held = " ".join(str(value) for value in vars(challenge).values())

    assert PHONE.lstrip("+") not in held
    assert code not in held.split()
    assert "5678" not in repr(challenge)
    assert challenge.code_hash not in repr(challenge)


@pytest.mark.parametrize("user_id", ["", " ", "user\x001", "u" * 256])
def test_a_challenge_needs_a_user(user_id: str) -> None:
    with pytest.raises(InvalidValue, match="user_id"):
        Challenge.issue(KEYS, user_id, PHONE, NOON)


# Events ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_class", "fields"),
    [
        (CodeRequested, {"challenge_id", "expires_at", "occurred_at"}),
        (CodeRejected, {"challenge_id", "tries_left", "occurred_at"}),
        (PhoneVerified, {"challenge_id", "user_id", "occurred_at"}),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_the_stored_example_is_what_we_read_and_write_and_nothing_private(
    event_class: type[Event], fields: set[str]
) -> None:
    stored = json.loads((EXAMPLES / f"{event_class.type}.json").read_text())

    event = read_event(event_class.type, uuid7(), stored)

    assert isinstance(event, event_class)
    assert event.payload() == stored
    assert set(stored) == fields
    assert (event.aggregate_type, event.aggregate_id) == ("challenge", stored["challenge_id"])
