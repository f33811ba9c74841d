"""How many codes and answers a phone number and a user may have, and how that is counted.

A challenge judges three answers, but anybody may ask for the next challenge: what stops guessing, and texts that
another pays for, is counted here, beyond challenges. docs/adr/0038-verification-limits.md says where the numbers
come from. Limits by address or by country are the web layer's: this domain sees neither.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import chain

from dovecote.errors import InvalidValue, RateLimited

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
#: How long a time counts for a limit; older ones may be removed.
LONGEST_WINDOW = DAY
_TIMES_KEPT = 100

Wait = tuple[type[RateLimited], datetime | None]


class CodeRequestedTooSoon(RateLimited):
    """A code was sent just now and still works. Request another after the pause."""

    why = "a code was requested just now"


class TooManyCodesThisHour(RateLimited):
    """No more codes within the hour for this number, or for this user: the error does not say which."""

    why = "too many codes were requested within an hour"


class TooManyCodesToday(RateLimited):
    """No more codes within 24 hours for this number, or for this user: the error does not say which."""

    why = "too many codes were requested within a day"


class TooManyAnswers(RateLimited):
    """Locked out: no answer is judged, not even the right one, and no code is sent, until `retry_at`."""

    why = "too many answers were judged within an hour"


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """What one phone number, or one user, may have. Windows slide: the last hour, the last 24 hours.

    pause            between two codes
    codes_an_hour    each is a text that costs money and disturbs its reader
    codes_a_day      with three answers a code, this bounds the guesses of a day too
    answers_an_hour  judged answers, right ones included, over all challenges

    Errors: InvalidValue for a count below one or a negative pause.
    """

    pause: timedelta = timedelta(seconds=30)
    codes_an_hour: int
    codes_a_day: int
    answers_an_hour: int

    def __post_init__(self) -> None:
        if self.pause < timedelta(0) or min(self.counts) < 1:
            raise InvalidValue(f"an allowance has a pause of 0 or more and counts of at least 1, got {self}")

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.codes_an_hour, self.codes_a_day, self.answers_an_hour


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a use case; both apply. A caller may pass its own.

    A user has less than a number: one account alone cannot use up what the number's owner needs.
    """

    phone: Allowance = Allowance(codes_an_hour=6, codes_a_day=12, answers_an_hour=10)
    user: Allowance = Allowance(codes_an_hour=5, codes_a_day=10, answers_an_hour=7)


LIMITS = Limits()


class QuotaKind(StrEnum):
    PHONE = "phone"
    USER = "user"


@dataclass(kw_only=True, eq=False)
class Quota:
    """What a phone number, by its keyed hash, or a user has used of its allowance. Times are sorted.

    Times are the callers' own, and clocks differ or are set back. A time that is later than the present one
    counts as well, so for every order of times at most `limit` of them are within any window: when the last of
    them was counted, all others were after the beginning of its window.
    """

    kind: QuotaKind
    subject: str = field(repr=False)
    allowance: Allowance
    codes_at: Sequence[datetime] = ()
    answers_at: Sequence[datetime] = ()

    def count_code(self, at: datetime) -> None:
        self.codes_at = self._latest([*self.codes_at, at])

    def count_answer(self, at: datetime) -> None:
        self.answers_at = self._latest([*self.answers_at, at])

    def answers_left(self, at: datetime) -> int:
        """Return how many answers would be judged at this time."""
        return max(0, self.allowance.answers_an_hour - sum(at < answered + HOUR for answered in self.answers_at))

    def code_waits(self) -> Iterator[Wait]:
        """Yield what holds back another code."""
        yield CodeRequestedTooSoon, _free_at(self.codes_at, 1, self.allowance.pause)
        yield TooManyCodesThisHour, _free_at(self.codes_at, self.allowance.codes_an_hour, HOUR)
        yield TooManyCodesToday, _free_at(self.codes_at, self.allowance.codes_a_day, DAY)
        # A code that could not be answered would be paid for in vain.
        yield from self.answer_waits()

    def answer_waits(self) -> Iterator[Wait]:
        """Yield what holds back the judging of another answer."""
        yield TooManyAnswers, _free_at(self.answers_at, self.allowance.answers_an_hour, HOUR)

    def _latest(self, times: Sequence[datetime]) -> Sequence[datetime]:
        # Only the latest decide (`_free_at`); more than this allowance asks for, since another caller's may be wider.
        return sorted(times)[-max(_TIMES_KEPT, *self.allowance.counts) :]


def require_code(quotas: Sequence[Quota], at: datetime) -> None:
    """Do nothing if all of them leave room for another code. Errors: RateLimited, the one that takes longest."""
    _require(chain.from_iterable(quota.code_waits() for quota in quotas), at)


def require_answer(quotas: Sequence[Quota], at: datetime) -> None:
    """Do nothing if all of them leave room for another answer. Errors: TooManyAnswers."""
    _require(chain.from_iterable(quota.answer_waits() for quota in quotas), at)


def _require(waits: Iterable[Wait], at: datetime) -> None:
    still = [(until, refusal) for refusal, until in waits if until is not None and at < until]
    if still:
        until, refusal = max(still, key=lambda wait: wait[0])
        raise refusal(at, until)


def _free_at(times: Sequence[datetime], limit: int, window: timedelta) -> datetime | None:
    """Return from when on fewer than `limit` of the sorted times are within the window; None if they never were."""
    return times[-limit] + window if len(times) >= limit else None
