"""The attack: guess the code of a number that is not mine, or have texts sent to it that somebody else pays for.

A challenge judges three answers, and anybody may ask for the next challenge; accounts cost nothing, and requests come
from many processes at once, whose clocks differ.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from domain.verification import (
    Allowance,
    ChallengeExpired,
    CodeRejected,
    CodeRequestedTooSoon,
    Limits,
    MalformedAnswer,
    NotMobile,
    NoTriesLeft,
    PhoneVerified,
    TooManyAnswers,
    TooManyCodesThisHour,
    TooManyCodesToday,
    answer_challenge,
    code_for,
    request_code,
    tries_left,
)
from dovecote.database import Sessions
from dovecote.errors import InvalidValue, NotFound, RateLimited
from dovecote.events.ids import uuid7
from dovecote.outbox import outbox
from dovecote.privacy import Keyring
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.phone_numbers import a_mobile
from tests.support.profiles import examples

pytestmark = pytest.mark.servers

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR, DAY, SECOND = timedelta(hours=1), timedelta(days=1), timedelta(seconds=1)
PAUSE = 30 * SECOND
KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)
WRONG = "000000"  # one challenge in a million has this code
_WIDE = Allowance(pause=timedelta(0), codes_an_hour=1_000, codes_a_day=1_000, answers_an_hour=1_000)


@pytest.fixture
def phone() -> str:
    return a_mobile()


@pytest.fixture
def user() -> str:
    return f"user-{uuid7()}"


def request(sessions: Sessions, user: str, phone: str, at: datetime, limits: Limits | None = None) -> UUID:
    with unit_of_work(sessions) as uow:
        return request_code(uow, KEYS, user, phone, at, limits=limits or Limits()).id


def answer(sessions: Sessions, user: str, challenge: UUID, code: str, at: datetime) -> PhoneVerified | CodeRejected:
    with unit_of_work(sessions) as uow:
        return answer_challenge(uow, KEYS, challenge, code, at, user_id=user)


def the_code(sessions: Sessions, challenge: UUID) -> str:
    with sessions() as session:
        requested = outbox.c.event_type == "verification.code_requested.v1"
        return code_for(
            KEYS, session.scalars(select(outbox.c.id).where(outbox.c.aggregate_id == str(challenge), requested)).one()
        )


def lock_out(sessions: Sessions, phone: str, at: datetime) -> datetime:
    """Use up a number's answers with four accounts and return the time of the last."""
    left = 10
    for turn in range(4):
        user, time = f"user-{uuid7()}", at + turn * PAUSE
        challenge = request(sessions, user, phone, time)
        for _ in range(min(3, left)):
            answer(sessions, user, challenge, WRONG, time)
            left -= 1
    return time


def max_within(times: Sequence[datetime], window: timedelta) -> int:
    return max((sum(start <= time < start + window for time in times) for start in times), default=0)


def at_once(*calls: Callable[[], None]) -> None:
    """Run them all at the same time; what they raise is raised here."""
    gate, failed = threading.Barrier(len(calls)), list[Exception]()

    def run(call: Callable[[], None]) -> None:
        gate.wait(10)
        try:
            call()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    if failed:
        raise failed[0]


# Guessing -------------------------------------------------------------------------------------


def test_a_challenge_after_the_other_does_not_give_more_guesses(sessions: Sessions, phone: str) -> None:
    """t_verify.py had 297 guesses and 99 texts for one number in 8 s. Here accounts and waiting cost nothing."""
    sent, judged = list[datetime](), list[datetime]()

    for turn in range(130):
        at, user = NOON + turn * PAUSE, f"user-{uuid7()}"
        try:
            challenge = request(sessions, user, phone, at)
            sent.append(at)
            for _ in range(3):
                answer(sessions, user, challenge, WRONG, at)
                judged.append(at)
        except RateLimited:
            pass

    assert (max_within(judged, HOUR), max_within(sent, HOUR)) == (10, 4)
    assert len(judged) == 20  # in 65 minutes


Move = tuple[str, int, int]  # what, which account, how many seconds the clock goes on


@settings(max_examples=examples(12))
@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["request", "answer", "answer", "answer"]),
            st.integers(0, 4),
            st.one_of(st.just(0), st.integers(0, 90), st.integers(-4_000, 4_000)),
        ),
        min_size=40,
        max_size=90,
    )
)
def test_no_interleaving_gives_more_guesses_or_texts(sessions: Sessions, moves: list[Move]) -> None:
    phone, at = a_mobile(), NOON
    run = uuid7()
    open_challenges: dict[int, UUID] = {}
    waits = list[tuple[datetime, RateLimited]]()
    sent, judged = list[datetime](), list[datetime]()

    for what, account, seconds in moves:
        at += seconds * SECOND
        user = f"{run}-{account}"
        try:
            if what == "request" or account not in open_challenges:
                open_challenges[account] = request(sessions, user, phone, at)
                sent.append(at)
            else:
                answer(sessions, user, open_challenges[account], WRONG, at)
                judged.append(at)
        except RateLimited as refusal:
            waits.append((at, refusal))
        except (NoTriesLeft, ChallengeExpired):
            pass

    assert all(refusal.retry_after > timedelta(0) for _, refusal in waits)
    assert all(refusal.retry_at == asked_at + refusal.retry_after for asked_at, refusal in waits)
    assert max_within(judged, HOUR) <= 10
    assert max_within(sent, HOUR) <= 6
    assert max_within(sent, DAY) <= 12
    assert max_within(sent, PAUSE) <= 1


def test_accounts_that_answer_at_the_same_time_have_ten_guesses_together(sessions: Sessions, phone: str) -> None:
    attackers = [f"user-{uuid7()}" for _ in range(4)]
    posed = [request(sessions, user, phone, NOON + turn * PAUSE) for turn, user in enumerate(attackers)]
    now = NOON + 4 * PAUSE
    heard = Counter[str]()

    def guess(user: str, challenge: UUID) -> Callable[[], None]:
        def try_it() -> None:
            try:
                heard[type(answer(sessions, user, challenge, WRONG, now)).__name__] += 1
            except TooManyAnswers as refusal:
                heard[type(refusal).__name__] += 1

        return try_it

    at_once(*(guess(user, which) for user, which in zip(attackers, posed, strict=True) for _ in range(3)))

    assert heard == {"CodeRejected": 10, "TooManyAnswers": 2}


def test_of_many_requests_at_the_same_time_one_is_sent(sessions: Sessions, phone: str) -> None:
    heard = Counter[str]()

    def ask() -> None:
        try:
            request(sessions, f"user-{uuid7()}", phone, NOON)
            heard["sent"] += 1
        except CodeRequestedTooSoon:
            heard["refused"] += 1

    at_once(*[ask] * 8)

    assert heard == {"sent": 1, "refused": 7}


def test_two_users_that_ask_for_each_other_s_numbers_never_wait_for_each_other(sessions: Sessions) -> None:
    users, phones = [f"user-{uuid7()}" for _ in range(2)], [a_mobile(), a_mobile()]
    wide = Limits(phone=_WIDE, user=_WIDE)

    def ask(user: str, numbers: list[str]) -> Callable[[], None]:
        def ask_again_and_again() -> None:
            for turn in range(20):
                request(sessions, user, numbers[turn % 2], NOON, wide)

        return ask_again_and_again

    at_once(*(ask(user, numbers) for user in users for numbers in (phones, phones[::-1])))  # a deadlock would raise

    with unit_of_work(sessions) as uow:
        used = uow.session.scalars(text("select cardinality(codes_at) from dovecote.verification_quotas"))
        assert list(used).count(40) == 4


# The lock-out ---------------------------------------------------------------------------------


def test_a_lock_out_says_its_end_and_ends_then(sessions: Sessions, phone: str, user: str) -> None:
    last = lock_out(sessions, phone, NOON)
    with pytest.raises(TooManyAnswers, match="at 2026-03-01 13:00:00 UTC") as refusal:
        request(sessions, user, phone, last + PAUSE)
    end = refusal.value.retry_at

    assert refusal.value.retry_after == end - last - PAUSE
    with pytest.raises(TooManyAnswers):
        request(sessions, user, phone, end - SECOND)
    challenge = request(sessions, user, phone, end)
    assert isinstance(answer(sessions, user, challenge, the_code(sessions, challenge), end), PhoneVerified)


def test_in_a_lock_out_not_even_the_right_answer_is_judged(sessions: Sessions, phone: str, user: str) -> None:
    early = request(sessions, user, phone, NOON)
    last = lock_out(sessions, phone, NOON + PAUSE)

    with pytest.raises(TooManyAnswers):
        answer(sessions, user, early, the_code(sessions, early), last)

    with unit_of_work(sessions) as uow:
        assert tries_left(uow, early, last) == 0


def test_asking_during_a_lock_out_makes_it_no_longer(sessions: Sessions, phone: str, user: str) -> None:
    last = lock_out(sessions, phone, NOON)

    for turn in range(1, 50):  # also within the pause, which ends sooner and is not what is said
        with pytest.raises(TooManyAnswers) as refusal:
            request(sessions, user, phone, last + turn * 10 * SECOND)

    assert refusal.value.retry_at == NOON + HOUR


def test_a_success_does_not_give_the_others_new_guesses(sessions: Sessions, phone: str, user: str) -> None:
    challenge = request(sessions, user, phone, NOON)
    answer(sessions, user, challenge, the_code(sessions, challenge), NOON)

    with pytest.raises(TooManyAnswers):
        lock_out(sessions, phone, NOON + PAUSE)  # ten more


def test_one_account_alone_locks_nobody_out(sessions: Sessions, phone: str, user: str) -> None:
    stranger, at = f"user-{uuid7()}", NOON

    def guess_for_an_hour() -> None:
        nonlocal at
        while at < NOON + HOUR:
            challenge = request(sessions, stranger, phone, at)
            for _ in range(3):
                answer(sessions, stranger, challenge, WRONG, at)
            at += PAUSE

    with pytest.raises(RateLimited):
        guess_for_an_hour()
    for turn in range(1, 100):
        with pytest.raises(RateLimited):
            request(sessions, stranger, phone, at + turn * SECOND)

    mine = request(sessions, user, phone, at + PAUSE)

    assert isinstance(answer(sessions, user, mine, the_code(sessions, mine), at + PAUSE), PhoneVerified)


def test_a_clock_that_is_set_back_does_not_lift_a_limit(sessions: Sessions, phone: str, user: str) -> None:
    lock_out(sessions, phone, NOON)
    earlier = NOON - HOUR

    with pytest.raises(TooManyAnswers) as refusal:
        request(sessions, user, phone, earlier)

    assert refusal.value.retry_after == 2 * HOUR


# Texts ----------------------------------------------------------------------------------------


def test_a_double_click_leaves_the_first_code_as_it_is(sessions: Sessions, phone: str, user: str) -> None:
    first = request(sessions, user, phone, NOON)

    with pytest.raises(CodeRequestedTooSoon, match="try again in 29 s") as refusal:
        request(sessions, user, phone, NOON + SECOND)

    assert refusal.value.retry_after == 29 * SECOND
    assert isinstance(answer(sessions, user, first, the_code(sessions, first), NOON), PhoneVerified)


@pytest.mark.parametrize("shared", ["the number", "the user"])
def test_codes_are_limited_by_the_hour_and_by_the_day(sessions: Sessions, shared: str) -> None:
    the_user, the_phone = f"user-{uuid7()}", a_mobile()
    an_hour, a_day = (6, 12) if shared == "the number" else (5, 10)
    sent, refused = list[datetime](), Counter[type[RateLimited]]()

    for minute in range(0, 36 * 60, 7):
        at = NOON + minute * timedelta(minutes=1)
        who = the_user if shared == "the user" else f"user-{uuid7()}"
        try:
            request(sessions, who, the_phone if shared == "the number" else a_mobile(), at)
            sent.append(at)
        except RateLimited as refusal:
            refused[type(refusal)] += 1

    assert (max_within(sent, HOUR), max_within(sent, DAY)) == (an_hour, a_day)
    assert set(refused) == {TooManyCodesThisHour, TooManyCodesToday}


@pytest.mark.parametrize("spelled", ["+49 (0)151 {}", "+490151{}", " +49-151-{} ", "+٤٩١٥١{}"])
def test_a_number_spelled_in_another_way_is_the_same_number(
    sessions: Sessions, phone: str, user: str, spelled: str
) -> None:
    request(sessions, f"user-{uuid7()}", phone, NOON)

    with pytest.raises(CodeRequestedTooSoon):
        request(sessions, user, spelled.format(phone.removeprefix("+49151")), NOON)


NOT_MOBILE = {
    "premium rate, US": "+19005551234",
    "premium rate, UK": "+449098790000",
    "premium rate, Germany": "+499001234567",
    "premium rate, of no country": "+979123456789",
    "toll free": "+18005550100",
    "landline": "+4930901820",
    "personal number": "+447012345678",
    "pager": "+4916812345678",
    "internet": "+43720123456",
    "satellite, Iridium": "+881612345678",
    "satellite, Inmarsat": "+870773111632",
    "network of no country": "+883510000000094",
}


@pytest.mark.parametrize("number", NOT_MOBILE.values(), ids=NOT_MOBILE)
def test_a_code_goes_to_mobile_phones_only(sessions: Sessions, user: str, number: str) -> None:
    with pytest.raises(NotMobile) as refusal:
        request(sessions, user, number, NOON)

    assert number[4:] not in str(refusal.value)


@pytest.mark.parametrize("number", ["+12015550123", "+16135550123", "+525512345678", "+447400123456", "+393123456789"])
def test_mobile_phones_get_their_code(sessions: Sessions, user: str, number: str) -> None:
    assert request(sessions, user, number, NOON)


@pytest.mark.parametrize("trouble", ["a pause", "a landline", "a malformed answer", "a lock-out", "a stranger"])
def test_a_refusal_writes_nothing_even_where_the_caller_goes_on(
    sessions: Sessions, phone: str, user: str, trouble: str
) -> None:
    owner = f"user-{uuid7()}"
    early = request(sessions, owner, phone, NOON)
    at = lock_out(sessions, phone, NOON + PAUSE) if trouble == "a lock-out" else NOON
    before = rows(sessions)
    refused: dict[str, Callable[[UnitOfWork], object]] = {
        "a pause": lambda uow: request_code(uow, KEYS, user, phone, at),
        "a landline": lambda uow: request_code(uow, KEYS, user, "+4930901820", at),
        "a malformed answer": lambda uow: answer_challenge(uow, KEYS, early, "1" * 100_000, at, user_id=owner),
        "a lock-out": lambda uow: answer_challenge(uow, KEYS, early, WRONG, at, user_id=owner),
        "a stranger": lambda uow: answer_challenge(uow, KEYS, early, WRONG, at, user_id=user),
    }

    with unit_of_work(sessions) as uow, pytest.raises((RateLimited, NotMobile, MalformedAnswer, NotFound)):
        refused[trouble](uow)

    assert rows(sessions) == before


def rows(sessions: Sessions) -> list[str]:
    """Every row that a request or an answer might write."""
    with sessions() as session:
        return [
            row
            for table in ("challenges", "verification_quotas", "verified_phones", "outbox")
            for row in session.scalars(text(f"select t::text from dovecote.{table} t order by 1"))
        ]


# Whose challenge it is ------------------------------------------------------------------------


def test_somebody_else_s_challenge_is_not_found_and_not_judged(sessions: Sessions, phone: str, user: str) -> None:
    challenge = request(sessions, user, phone, NOON)
    code = the_code(sessions, challenge)
    heard = set()

    for stranger in ("mallory", "", user.upper(), f"{user} "):
        for which in (challenge, unknown := uuid7()):
            with pytest.raises(NotFound) as refusal:
                answer(sessions, stranger, which, code, NOON)
            heard.add(str(refusal.value).replace(str(challenge), "it").replace(str(unknown), "it"))

    assert len(heard) == 1, "a stranger must not learn that it is there"
    with unit_of_work(sessions) as uow:
        assert tries_left(uow, challenge, NOON) == 3
    assert isinstance(answer(sessions, user, challenge, code, NOON), PhoneVerified)


def test_an_answer_without_a_user_is_a_mistake_of_the_caller(sessions: Sessions, phone: str, user: str) -> None:
    challenge = request(sessions, user, phone, NOON)

    with unit_of_work(sessions) as uow, pytest.raises(TypeError, match="user_id"):
        answer_challenge(uow, KEYS, challenge, WRONG, NOON)  # type: ignore[call-arg]  # the mistake


def test_an_allowance_that_would_never_end_is_refused() -> None:
    for wrong in ({"codes_an_hour": 0}, {"answers_an_hour": -1}, {"pause": -SECOND}):
        with pytest.raises(InvalidValue, match="allowance"):
            Allowance(**{"codes_an_hour": 1, "codes_a_day": 1, "answers_an_hour": 1, **wrong})  # type: ignore[arg-type]  # mixed on purpose
