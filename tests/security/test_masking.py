"""The attack: a writer puts one event into the outbox whose text makes masking and fingerprints take for ever.

`re` holds the interpreter lock, so heartbeat, time limits and SIGTERM would wait as well. Everything here is linear in
its text, and the text is cut before it is looked at. Growth is measured in CPU time of this thread, which other load on
the machine does not change much, over two doublings, as the best of several runs.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import orjson
import psycopg
import pytest
from sqlalchemy import text

from domain.billing.events import MembershipActivated, PaymentRecorded
from domain.pricing import PriceQuoted, Quote
from domain.verification.events import CodeRequested
from dovecote import masking
from dovecote.envelope import Envelope, read_envelope
from dovecote.envelope.stored_json import read_stored
from dovecote.errors import InvalidEvent, InvalidValue, shown, shown_error
from dovecote.events import Event, read_event
from dovecote.events.ids import uuid7
from dovecote.events.money import Money
from dovecote.masking import MAX_CHARACTERS, masked, masked_fields, masked_payload
from dovecote.processes.terminal import block, plain
from dovecote.settings import Settings
from dovecote.telemetry.failures import describe, fingerprint, traceback_of
from tests.security.patterns import COMMON, Used, inline, patterns
from tests.support.system import system_for
from workers.routes import ROUTES

# A quadratic pattern needs hundreds of milliseconds for so many characters; what takes less than this need not be
# measured more closely.
FEW = 8_000
QUICK_SECONDS, TOO_SLOW_SECONDS = 0.01, 0.1
# Of a doubling. A linear one is 2, a quadratic one 4.
MAX_GROWTH = 3.0
UNITS = [unit for unit in COMMON if unit != "\ud800"]


def seconds(work: Callable[[], object], runs: int = 3) -> float:
    """Return the CPU time of the quickest of several runs."""
    best = float("inf")
    for _ in range(runs):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best


def grows_too_fast(work: Callable[[str], object], begun: str, unit: str, few: int = FEW) -> str | None:
    """Return how the time grows, if it does by more than a factor of 3 with each doubling of the text."""

    def of(length: int) -> Callable[[], object]:
        subject = begun + unit * (length // len(unit))
        return lambda: work(subject)

    if seconds(of(few), 1) < QUICK_SECONDS:
        return None
    for _ in range(2):  # once more, should something else have been running
        first = seconds(of(few))
        last = seconds(of(4 * few), 1 if first > TOO_SLOW_SECONDS else 3)
        if last < first * MAX_GROWTH**2:
            return None
    return f"{begun!r} + {unit!r} * n: {first:.4f} s, then {last:.4f} s for four times as much"


@pytest.mark.parametrize("used", patterns(), ids=lambda used: used.name)
def test_no_pattern_takes_more_than_thrice_as_long_for_twice_the_text(used: Used) -> None:
    slow = [grown for begun, unit in used.hostile() if (grown := grows_too_fast(used.run, begun, unit))]

    assert not slow


def test_every_pattern_has_a_name_by_which_it_is_tested() -> None:
    assert len(patterns()) > 20
    assert list(inline()) == []


def of_error(work: Callable[[BaseException], object]) -> Callable[[str], object]:
    return lambda subject: work(ValueError(subject))


@pytest.mark.parametrize(
    "work",
    [
        lambda subject: masked(subject, most=10**9),
        lambda subject: masked(subject, ["ab" * 40, "aaaa", "a" * 100, subject], most=10**9),
        lambda subject: masked_fields({subject: subject, "phone": subject, "list": [subject]}, 10**9),
        lambda subject: masked_payload({"a": {subject[-50:]: [subject, {"b": subject}]}}),
        of_error(fingerprint),
        of_error(traceback_of),
        lambda subject: (shown(subject), shown([subject]), shown({subject: subject})),
        plain,
        block,
    ],
    ids=["masked", "hidden", "describe", "payload", "fingerprint", "traceback", "shown", "plain", "block"],
)
def test_nothing_that_reads_a_hostile_text_is_slower_than_linear(work: Callable[[str], object]) -> None:
    slow = [grown for unit in UNITS if (grown := grows_too_fast(work, "", unit, FEW // 4))]

    assert not slow


# One event ----------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
MOST = 250_000
HOSTILE: list[Any] = [
    ["a" * MOST],
    "a" * MOST,
    "-" + "9" * MOST,
    "1e" + "9" * MOST,
    "0." + "1" * MOST,
    "1e999999999",
    "-1e999999999",
    "sNaN",
    "\u202e" * (MOST // 3),
    "\x1b[2J\n" * (MOST // 5),
    {"a" * MOST: 1},
    {str(number): number for number in range(20_000)},
    ["a"] * (MOST // 4),
    orjson.loads("[" * 1_000 + "]" * 1_000),
    json.loads('{"a":' * 500 + "1" + "}" * 500),
    {"amount_minor": "9" * MOST, "currency": "EUR"},
    {"amount_minor": 5, "currency": "a" * MOST},
    {"amount_minor": 5, "currency": ["a" * MOST]},
    {"amount_minor": -(10**18), "currency": "EUR"},
    {"encrypted": "a" * MOST},
    {"encrypted": ":" + "a" * MOST},
    *(unit * (MOST // len(unit)) for unit in ("Key (", "[SQL: '", "://a:", "\n", "\x00")),
]
KINDS = (PriceQuoted, PaymentRecorded, MembershipActivated, CodeRequested)


def an_envelope(event_type: str, payload: dict[str, Any]) -> Envelope:
    attributes = {"id": str(uuid7()), "type": event_type, "source": "/dovecote/a", "subject": "a", "position": "1"}
    return read_envelope({**attributes, "time": NOW.isoformat(), "data": payload})


def fails_briefly(kind: type[Event], payload: dict[str, Any]) -> bool:
    """Do what a consumer does with an event: read it, judge it, keep why not. Return whether what is kept is short."""
    envelope = an_envelope(kind.type, payload)
    try:
        event = envelope.event
        if kind.type == "pricing.price_quoted.v1":
            Quote(**{name: getattr(event, name) for name in ("symbol", "price", "as_of")})
    except Exception as caught:
        failure = describe(caught, envelope)
        sizes = len(str(caught)) < 600, len(failure.headline) <= 1_004, len(failure.text) <= MAX_CHARACTERS + 100
        return all(sizes) and len(failure.headline.splitlines()) == 1
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_with_a_hostile_value_fails_by_itself_within_milliseconds(kind: type[Event]) -> None:
    contents: dict[str, Any] = {one.name: "x" for one in fields(kind) if one.name != "event_id"} | {
        one.name: NOW.isoformat() for one in fields(kind) if one.name.endswith("_at") or one.name in ("as_of",)
    }
    contents |= {"price": "1", "amount": {"amount_minor": 1, "currency": "EUR"}}

    for name in contents:
        for value in HOSTILE:
            payload = {**contents, name: value}
            assert fails_briefly(kind, payload)
            took = seconds(partial(fails_briefly, kind, payload), runs=1)
            if took > 0.02:
                took = seconds(partial(fails_briefly, kind, payload), runs=5)
            assert took < 0.02, f"{name}={shown(value)}: {took:.3f} s"


def test_numbers_that_python_cannot_write_are_refused_in_words() -> None:
    huge = 10**260_000

    with pytest.raises(InvalidValue, match="three capital letters"):
        Money(huge, "eur")
    assert str(Money(huge, "EUR")) == "an integer of about 260001 digits EUR minor units"
    with pytest.raises(InvalidValue, match=r"a price is a positive number, got -9{79}\.\.\."):
        Quote(symbol="EUR", price=Decimal("-" + "9" * 260_000), as_of=NOW)
    with pytest.raises(InvalidEvent, match="expected str, got an integer of about 260001 digits"):
        read_event("pricing.price_quoted.v1", uuid7(), {"occurred_at": NOW.isoformat(), "symbol": huge})
    assert shown_error(KeyError(huge)) == "KeyError(an integer of about 260001 digits)"
    assert masked_fields({"count": huge}) == {"count": "an integer of about 260001 digits"}
    assert read_stored('{"n": 1' + "0" * 260_000 + ', "f": 1e400}') == {
        "n": "1" + "0" * 39 + "... (260001 digits)",
        "f": "1e400... (5 digits)",
    }


# Errors of handlers -------------------------------------------------------------------------------


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


class Odd(Exception):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value] # that is the point


def chained(count: int, link: str) -> BaseException:
    last: BaseException = ValueError("the first")
    for number in range(count):
        error = ValueError(f"number {number}")
        setattr(error, link, last)
        last = error
    return last


def nested(depth: int) -> BaseException:
    error: Exception = ValueError("inside")
    for _ in range(depth):
        error = ExceptionGroup("outside", [error])
    return error


def recursion() -> BaseException:
    def deeper() -> None:
        deeper()

    try:
        deeper()
    except RecursionError as error:
        return error
    raise AssertionError("it has an end")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "a long chain": lambda: chained(20_000, "__cause__"),
    "a long context": lambda: chained(20_000, "__context__"),
    "a wide group": lambda: ExceptionGroup("many", [ValueError("a" * 100) for _ in range(100_000)]),
    "a deep group": lambda: nested(900),
    "a tree of groups": lambda: ExceptionGroup("a", [ExceptionGroup("b", [ValueError("c")] * 300)] * 300),
    "a recursion": recursion,
    "a message of megabytes": lambda: ValueError("password=a " * 400_000),
    "many notes": lambda: _with_notes(ValueError("a"), 100_000),
    "one without a text": Mute,
    "one whose text is none": Odd,
    "a statement": lambda: ValueError("[SQL: '" * 500_000),
}


def _with_notes(error: BaseException, count: int) -> BaseException:
    for _ in range(count):
        error.add_note("a" * 100)
    return error


@pytest.mark.parametrize("name", ERRORS)
def test_what_is_kept_of_an_error_is_bounded_however_large_it_is(name: str) -> None:
    error = ERRORS[name]()
    envelope = an_envelope("pricing.price_quoted.v1", {})

    took = seconds(lambda: describe(error, envelope), runs=5)
    failure = describe(error, envelope)

    assert took < 0.06
    assert len(failure.text) <= MAX_CHARACTERS + 100
    assert len(failure.headline) <= 1_004
    assert failure.type in failure.headline


def test_a_traceback_shows_causes_members_and_notes_as_python_does() -> None:
    try:
        try:
            raise ExceptionGroup("two", [ValueError("one"), KeyError("two")])
        except ExceptionGroup as error:
            error.add_note("a note")
            raise RuntimeError("outside") from error
    except RuntimeError as error:
        shown_traceback = traceback_of(error)

    places = [
        shown_traceback.index(words)
        for words in (
            "Traceback (most recent call last):",
            "ExceptionGroup: two (2 sub-exceptions)",
            "a note",
            "member 1 of 2:",
            "ValueError: one",
            "KeyError: 'two'",
            "The above exception was the direct cause of the following exception:",
            "RuntimeError: outside",
        )
    ]
    assert places == sorted(places)


# Secrets ------------------------------------------------------------------------------------------

SECRET = "S3cr3tvalueOfTwentyFour0"


@pytest.mark.parametrize(
    "words",
    [
        f"password={SECRET}",
        f"password='{SECRET} {SECRET}'",
        f'"api_key": "{SECRET}"',
        f"postgresql://dovecote:{SECRET}@host/db",
        f"Authorization: Bearer {SECRET}",
        f"eyJ{SECRET}.{SECRET}.{SECRET}",
        f"sk_live_{SECRET}",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n{SECRET}\n-----END PRIVATE KEY-----",
        f"DETAIL:  Key (a)=({SECRET}) already exists.",
        f"Failing row contains (1, {SECRET}).",
        f"[SQL: insert into t values ('{SECRET}')]\n",
        f"known {SECRET[::-1]}",
        f"hidden a value with {SECRET} in the middle of it",
    ],
)
def test_a_secret_that_straddles_a_cut_shows_no_part_of_itself(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", {SECRET[::-1]})
    hidden = [words.removeprefix("hidden ")] if words.startswith("hidden ") else []
    most = 1_000
    parts = {each[at : at + 6] for each in (SECRET, SECRET[::-1]) for at in range(len(SECRET) - 5)}

    for at in range(most // 2 - len(words) - 3, most // 2 + 3):
        before, behind = "x " * (at // 2) + "\n" * (at % 2), "\n" + "y " * 2_000
        for whole in (f"{before} {words}{behind}", f"{behind} {words} {before}"):
            shortened = masked(whole, hidden, most)
            assert not [part for part in parts if part in shortened], (at, shortened[at - 100 : at + 200])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("my PIN is 4711", "my PIN is ***"),
        ("OTP 123456", "OTP ***"),
        ("key=AAAA", "key=***"),
        (f'"key": "{SECRET}"', '"key": "***"'),
        ("IBAN DE89 3704 0044 0532 0130 00.", "IBAN ***."),
        ("GB33BUKB20201555555555", "***"),
        ("http://tokenoftwentyormoreletters@collector/v1", "http://***@collector/v1"),
        ("postgresql://dovecote@db/x and redis://:S3cr3t:@x@h/0", "postgresql://dovecote@db/x and redis://:***@h/0"),
    ],
)
def test_further_kinds_are_masked(words: str, expected: str) -> None:
    assert masked(words) == expected


def test_a_part_of_a_long_secret_is_masked_too() -> None:
    value = "a sensitive note that is far longer than an error shows of it"

    assert masked(f"got {value[:40]!r}...", [value]) == "got '***'..."
    assert masked(f"... {value[-30:]}", [value]) == "... ***"


def test_nothing_that_was_masked_is_kept_in_memory() -> None:
    for number in range(5_000):
        masked_fields(
            {"event": f"call +49151{number:07}", "password": SECRET, "error": f"password={SECRET}", "n": f"a{number}"}
        )

    kept = masking._harmless
    assert not [one for one in kept if SECRET in one or "+49" in one]
    assert sum(map(len, kept)) <= 2_048 * 200
    assert not [one for one in gc.get_objects() if type(one) is dict and SECRET in one]


# In the consumer ----------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"symbol": ["a" * MOST]},
    {"symbol": "POISON", "price": "-" + "9" * MOST},
    {"symbol": "POISON", "price": "1e" + "9" * MOST},
    {"symbol": "POISON", "price": "1e-250000"},
    {"symbol": "a" * MOST},
    {"symbol": "POISON", "as_of": "[SQL: " * (MOST // 6)},
]


@pytest.mark.servers
@pytest.mark.once
def test_honest_prices_behind_hostile_ones_go_through(settings: Settings) -> None:
    routes = [route for route in ROUTES if route.handler == "pricing.apply_quotes"]
    honest: dict[str, Any] = {"price": "1.5", "as_of": NOW.isoformat(), "occurred_at": NOW.isoformat()}

    with system_for(settings, routes) as system:
        with psycopg.connect(settings.database.url.get_secret_value(), autocommit=True) as writer:
            for number, poison in enumerate(poison for row in ROWS for poison in (row, {})):
                writer.execute(
                    "select dovecote.append_event('price', %s, 'pricing.price_quoted.v1', %s, '{}')",
                    (f"S{number}", json.dumps({**honest, "symbol": f"S{number}", **poison})),
                )
        with system.running():
            system.until_quiet()
        with system.engine.connect() as connection:
            known = set(connection.execute(text("select symbol from dovecote.latest_prices")).scalars())
            failed = connection.execute(text("select state, error from dovecote.deliveries")).all()

    assert known == {f"S{2 * number + 1}" for number in range(len(ROWS))}
    assert [row.state for row in failed] == ["dead"] * len(ROWS)
    assert max(len(row.error) for row in failed) < 5_000
