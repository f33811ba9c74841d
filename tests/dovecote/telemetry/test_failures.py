"""What is kept of an error: groups of one kind, and nothing that nobody may read."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from uuid import uuid4

import orjson
import psycopg
import pytest
from sqlalchemy import Engine, text

from dovecote.envelope import Envelope
from dovecote.errors import Refused
from dovecote.events import Event, sensitive
from dovecote.events.ids import uuid7
from dovecote.privacy import Keyring
from dovecote.telemetry.failures import Failure, describe, fingerprint
from tests.conftest import Servers

KEYS = Keyring(hash_key=b"k" * 32, current="k1", encryption_keys={"k1": b"k" * 32}, code_key=b"k" * 32)


@dataclass(frozen=True, kw_only=True)
class SalaryAgreed(Event, type="payroll.salary_agreed.v1", aggregate="employee", key="name"):
    name: str
    salary: str = sensitive()


def an_envelope(name: str = "alice", salary: str = "4711 EUR") -> Envelope:
    agreed = SalaryAgreed(name=name, salary=salary, occurred_at=datetime.now(UTC))
    return Envelope(
        event_id=agreed.event_id,
        type=agreed.type,
        aggregate_type="employee",
        aggregate_id=name,
        position=1,
        time="",
        data=orjson.loads(orjson.dumps(agreed.payload(KEYS))),
        keys=KEYS,
    )


def raised_by(handler: Callable[[], object]) -> BaseException:
    try:
        handler()
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


def fail(message: str) -> None:
    raise RuntimeError(message)


def described(handler: Callable[[], object], envelope: Envelope | None = None) -> Failure:
    return describe(raised_by(handler), envelope or an_envelope())


# One kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ("no room for 17", "no room for 230"),
        pytest.param(f"event {uuid7()} is late", f"event {uuid4()} is late", id="event ids"),
        ("cannot read 'abc'", "cannot read 'it is\\'nt'"),
        ('unknown "x"', 'unknown "y z"'),
        ("at 2026-11-20T12:00:00+00:00", "at 2027-01-01T00:00:00.5+02:00"),
        ("price 1.50 EUR", "price 2,000.75 EUR"),
        ("read 0x7f3a2b object", "read 0xdeadbeef0 object"),
        ("to https://sms.example/v1/1234?to=7", "to https://sms.example/v1/99?to=8"),
    ],
)
def test_numbers_ids_and_quoted_values_part_no_group(one: str, another: str) -> None:
    assert fingerprint(raised_by(lambda: fail(one))) == fingerprint(raised_by(lambda: fail(another)))


def test_the_aggregate_s_id_parts_no_group() -> None:
    alice, bob = an_envelope("alice"), an_envelope("bob")

    assert (
        described(lambda: fail("alice is away"), alice).fingerprint
        == described(lambda: fail("bob is away"), bob).fingerprint
    )


def elsewhere(message: str) -> None:
    raise RuntimeError(message)


def caused(cause: Exception) -> None:
    try:
        raise cause
    except Exception as error:
        raise RuntimeError("it failed") from error


@pytest.mark.parametrize(
    ("one", "another"),
    [
        (lambda: fail("no room"), lambda: fail("no time")),
        (lambda: fail("no room"), lambda: elsewhere("no room")),
        (lambda: int("a"), lambda: float("a")),
        (lambda: caused(ValueError("a")), lambda: caused(KeyError("a"))),
        (lambda: caused(ValueError("no a")), lambda: caused(ValueError("no b"))),
    ],
)
def test_another_type_place_message_or_cause_is_another_kind(
    one: Callable[[], object], another: Callable[[], object]
) -> None:
    assert fingerprint(raised_by(one)) != fingerprint(raised_by(another))


@pytest.mark.servers
def test_errors_of_postgres_group_by_their_code_and_constraint(engine: Engine) -> None:
    def insert(value: str) -> None:
        with engine.begin() as connection:
            connection.execute(text("create temp table t (a text unique, b int check (b > 0)) on commit drop"))
            connection.execute(text(f"insert into t values ('{value}', 1), ('{value}', 1)"))

    def insert_negative() -> None:
        with engine.begin() as connection:
            connection.execute(text("create temp table t (a text unique, b int check (b > 0)) on commit drop"))
            connection.execute(text("insert into t values ('secret row', -1)"))

    assert fingerprint(raised_by(lambda: insert("x"))) == fingerprint(raised_by(lambda: insert("a longer one")))
    assert fingerprint(raised_by(lambda: insert("x"))) != fingerprint(raised_by(insert_negative))


@pytest.mark.servers
def test_the_row_that_postgres_refuses_is_not_in_it(engine: Engine) -> None:
    def insert(values: str) -> None:
        with engine.begin() as connection:
            connection.execute(text("create temp table t (a text unique, b int check (b > 0)) on commit drop"))
            connection.execute(text("insert into t values (:a, :b), (:a, :b)"), orjson.loads(values))
            connection.execute(text("insert into t values ('a secret row', -1)"))

    for values in ('{"a": "a secret row", "b": -1}', '{"a": "a secret row", "b": 1}'):
        failure = described(partial(insert, values))
        assert "DETAIL" in failure.text
        assert "a secret row" not in failure.text.partition("Error:")[2]
        assert "a secret row" not in failure.headline


def test_a_fingerprint_is_the_same_in_another_process() -> None:
    script = "from tests.dovecote.telemetry.test_failures import *\n"
    script += "print(fingerprint(raised_by(lambda: fail('no room for 5'))))"

    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()

    assert there == fingerprint(raised_by(lambda: fail("no room for 6")))


# Nothing that nobody may read ---------------------------------------------------------------------


class Evil(Exception):
    def __str__(self) -> str:
        raise ValueError("not even this")


def test_local_variables_are_not_in_it() -> None:
    value = "".join(["local-", "variable"])

    def handler() -> None:
        here = value.upper()
        raise RuntimeError(len(here))

    assert value.upper() not in described(handler).text


def test_sensitive_fields_of_the_event_are_not_in_it() -> None:
    envelope = an_envelope(salary="5000 EUR a month")

    def handler() -> None:
        event = envelope.event
        assert isinstance(event, SalaryAgreed)
        try:
            raise ValueError(event.salary)
        except ValueError as error:
            error.add_note(f"note: {event.salary}")
            raise KeyError(event.salary, event.name) from error

    failure = described(handler, envelope)

    assert "KeyError" in failure.text
    assert "ValueError" in failure.text
    for kept in (failure.text, failure.headline):
        assert "5000" not in kept


def test_an_error_that_cannot_be_described_is_kept_all_the_same() -> None:
    def handler() -> None:
        raise Evil

    failure = described(handler)

    assert failure.type == "Evil"
    assert "Evil" in failure.text
    assert "Evil" in failure.headline


def test_what_postgres_cannot_keep_is_written_in_letters(servers: Servers) -> None:
    failure = described(lambda: fail("nul \x00 and surrogate \udc80"))

    with psycopg.connect(servers.postgres_url) as connection:
        assert connection.execute("select %s", (failure.text,)).fetchone() == (failure.text,)


def test_a_long_text_loses_its_middle_and_quickly() -> None:
    failure = described(lambda: fail("first " + "+49 151 1234567 x" * 300_000 + " last"))

    assert 5_000 < len(failure.text) < 21_000
    assert failure.text.startswith("Traceback")
    assert failure.text.rstrip().endswith("last")
    assert "1234567" not in failure.text


def test_a_refusal_keeps_its_words() -> None:
    assert described(lambda: (_ for _ in ()).throw(Refused("membership x is cancelled"))).headline == (
        "Refused: membership x is cancelled"
    )
