"""Whatever comes in, nothing is lost and nobody is shown a traceback.

A few hundred cases in every run; HYPOTHESIS_PROFILE=thorough tries 100,000.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session, sessionmaker

from domain.pricing import Quote
from dovecote import cli
from dovecote.cli import commands
from dovecote.envelope import read_bundle, read_message
from dovecote.relay.bundler import Bundler
from tests.support.profiles import examples
from workers.app import app as application
from workers.gateways.price_files import Columns, NotReadable, Refusal, ingest, opened, prices
from workers.routes import ROUTES

COLUMNS = Columns("symbol", "price", "at")
QUOTED = "pricing.price_quoted.v1"

# append_event -----------------------------------------------------------------------------------

WORDS = st.sampled_from(["price", "Price", "", "a_1", "x" * 63, "x" * 64, "é", "a\n", QUOTED, "a.b.v0", "a.b.v99"])
ANY_TEXT = st.text(max_size=30) | WORDS | st.integers(150, 250).map(lambda length: "x" * length)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**80), 10**80)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
JSON_TEXT = st.one_of(
    st.dictionaries(st.text(max_size=5), JSON, max_size=4).map(json.dumps),
    JSON.map(lambda value: json.dumps(value, ensure_ascii=False)),
    st.sampled_from(
        [
            '{"x": 1e400}',
            '{"x": 1e200000}',
            '{"x": "\\u0000"}',
            '{"x": "\\ud800"}',
            "{",
            "",
            "[" * 50_000,
            '{"a":1,"a":2}',
        ]
    ),
    st.text(max_size=10),
)
HEADERS = st.one_of(
    st.just("{}"),
    st.dictionaries(st.sampled_from(["traceparent", "tracestate", "correlation_id", "x"]), JSON).map(json.dumps),
    st.sampled_from(['{"traceparent": 1e400}', '{"correlation_id": ' + "[" * 1_100 + "]" * 1_100 + "}"]),
    JSON_TEXT,
)
EVENTS = st.lists(
    st.tuples(ANY_TEXT | st.just("price"), ANY_TEXT | st.just("EUR"), ANY_TEXT | st.just(QUOTED), JSON_TEXT, HEADERS)
    | st.tuples(st.just("price"), st.text(min_size=1, max_size=20), st.just(QUOTED), JSON_TEXT, HEADERS),
    min_size=10,
    max_size=10,
)
# Refused by the check, not JSON, a NUL or half a surrogate pair, a number or nesting beyond what jsonb holds.
IN_WORDS = {"23514", "22P02", "22P05", "22003", "54000", "54001", "22021", "22023"}


@pytest.fixture(scope="module")
def connection(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database_url) as connection:
        yield connection


@pytest.mark.servers
@given(events=EVENTS)
@settings(max_examples=examples(20, 2_000))
def test_an_event_is_refused_in_words_or_comes_back_as_it_went_in(
    connection: psycopg.Connection[Any], events: list[tuple[str, str, str, str, str]]
) -> None:
    written, rows, refusals = [], [], []
    for event in events:
        try:
            with connection.transaction():
                found = connection.execute("select dovecote.append_event(%s, %s, %s, %s, %s)", event).fetchone()
            assert found
            row = connection.execute(
                "select position, event_type, dovecote.envelope(o) from dovecote.outbox o where id = %s", found
            ).fetchone()
            assert row, "an event that was taken is gone"
            rows.append((row[0], QUOTED, row[2].encode()))
            written.append((found[0], *event))
        except psycopg.Error as refusal:
            refusals.append(refusal)
    connection.rollback()
    for one in refusals:
        assert one.sqlstate in IN_WORDS or "NUL" in str(one), one

    came = [envelope for bundle in Bundler(ROUTES).bundles(rows) for envelope in read_bundle(bundle.message).envelopes]

    assert [envelope.event_id for envelope in came] == [id for id, *_ in written]
    for envelope, (_, aggregate_type, aggregate_id, event_type, payload, _) in zip(came, written, strict=True):
        assert (envelope.aggregate_type, envelope.aggregate_id) == (aggregate_type, aggregate_id)
        assert envelope.type == event_type
        assert envelope.unreadable or same(envelope.data, json.loads(payload))
        assert isinstance(envelope.traceparent, str | None)
        assert isinstance(envelope.correlation_id, str | None)


def same(one: object, other: object) -> bool:
    """Compare JSON; a number beyond 64 bits comes back as the nearest float, as JSON's readers have it."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float) and not isinstance(one, bool):
        return one == other or math.isclose(one, other, rel_tol=1e-15)
    return one == other


# The envelope decoder ---------------------------------------------------------------------------

ENVELOPE = (
    b'{"specversion":"1.0","id":"01a1f94c-b163-7128-b3a1-26224ce3d3c1","source":"/dovecote/price",'
    b'"type":"pricing.price_quoted.v1","subject":"EUR","time":"2026-11-20T12:00:00+00:00","position":"1",'
    b'"data":{"symbol": "EUR"}}'
)
MESSAGE = next(Bundler(ROUTES).bundles([(n, QUOTED, ENVELOPE) for n in range(3)])).message


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a stretch cut out and something else put in."""
    start = draw(st.integers(0, len(whole)))
    stop = draw(st.integers(start, min(len(whole), start + draw(st.sampled_from([0, 1, 5, 200])))))
    put_in = draw(st.binary(max_size=8) | st.sampled_from([b"", b'"', b"}", b"\n", b"null", b"1e999", b"[" * 2_000]))
    return whole[:start] + put_in + whole[stop:]


@given(data=st.binary(max_size=80) | damaged(MESSAGE) | JSON.map(lambda value: json.dumps(value).encode()))
@example(data=b"{}")
@example(data=b"1")
@example(data=b'[{"args":[]}\n]')
@settings(max_examples=examples(200, 20_000))
def test_bytes_are_a_message_or_are_said_to_be_none(data: bytes) -> None:
    with suppress(ValueError):
        message = read_message(data)

        assert isinstance(message["options"]["redis_message_id"], str)
    with suppress(ValueError):
        contents = read_bundle(data)

        assert len(contents.envelopes) + len(contents.broken) == data.count(b"\n") - 1


@given(payload=JSON_TEXT, place=st.integers(0, 2))
@settings(max_examples=examples(100, 10_000))
def test_a_payload_that_cannot_be_read_takes_no_other_event_along(payload: str, place: int) -> None:
    line = ENVELOPE.replace(b'{"symbol": "EUR"}', payload.replace("\n", " ").encode())
    rows = [(n, QUOTED, line if n == place else ENVELOPE) for n in range(3)]

    (bundle,) = Bundler(ROUTES).bundles(rows)
    envelopes = read_bundle(bundle.message).envelopes

    assert [str(envelope.event_id) for envelope in envelopes] == [orjson.loads(ENVELOPE)["id"]] * 3
    assert all(envelope.data == {"symbol": "EUR"} for n, envelope in enumerate(envelopes) if n != place)


# The command ------------------------------------------------------------------------------------

# These start something that goes on; asked for what they cannot do, they must say so at once.
GOES_ON = [["up"], ["relay"], ["demo"], ["events", "tail"]]
ENDS = [[], ["status"], ["migrate"], ["settings"], ["maintain"], ["partitions"], ["ingest"], ["ingest", "prices"]]
ENDS += [["audit"], ["doctor"], ["recover"], ["aggregates", "blocked"], ["events", "list"], ["events", "show"]]
ENDS += [["deliveries", verb] for verb in ("list", "show", "retry", "discard")]
ENDS += [["keys", verb] for verb in ("list", "rotate", "revoke")]
ENDS += [["handlers", verb] for verb in ("list", "pause", "resume")]
ENDS += [["replay", verb] for verb in ("start", "pause", "resume", "cancel", "show", "list")]
OPTIONS = ["--json", "--help", "--version", "--in-force", "--markdown", "--to", "--dry-run", "--format", "--symbol"]
OPTIONS += ["--per-transaction", "--strict", "--archive-dir", "--keep-weeks", "--weeks-ahead", "--", "-", "-x"]
OPTIONS += [
    "--handler",
    "--reason",
    "--since",
    "--until",
    "--event",
    "--rate",
    "--yes",
    "--state",
    "--actor",
    "--limit",
]
ARGUMENTS = st.lists(
    st.sampled_from(OPTIONS) | st.text(max_size=8).filter(lambda word: "\0" not in word) | st.integers().map(str),
    max_size=5,
)
COMMANDS = st.one_of(
    st.builds(lambda command, more: [*command, *more], st.sampled_from(ENDS), ARGUMENTS),
    st.builds(lambda command, more: [*command, "--no-such-thing", *more], st.sampled_from(GOES_ON), ARGUMENTS),
    st.lists(st.text(max_size=10).filter(lambda word: word not in ("up", "relay", "demo", "exec")), max_size=3),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@given(words=COMMANDS)
@settings(max_examples=examples(60, 20_000))
def test_whatever_is_typed_the_command_ends_with_a_sentence_and_a_code(home: Path, words: list[str]) -> None:
    nowhere = {"DATABASE_URL": "postgresql://me@127.0.0.1:1/mine", "REDIS_URL": "redis://127.0.0.1:1/0"}
    printed = StringIO()
    before = Path.cwd()
    os.chdir(home)
    try:
        with (
            patch.dict(
                os.environ,
                {"PATH": os.environ["PATH"], "DOVECOTE_APP": "workers.app:app", "DOVECOTE_HOME": str(home), **nowhere},
                clear=True,
            ),
            patch.object(sys, "argv", ["dovecote", *words]),
            patch.object(sys, "stdin", StringIO("")),
            redirect_stdout(printed),
            redirect_stderr(printed),
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    finally:
        os.chdir(before)

    assert ended.value.code in (0, 1, 2, None), printed.getvalue()
    assert "Traceback" not in printed.getvalue()
    assert printed.getvalue(), "it ended without a word"


def test_every_command_is_among_those_that_are_tried() -> None:
    names = {*commands.COMMANDS, *application.commands}

    assert names - {"exec"} == {words[0] for words in [*GOES_ON, *ENDS] if words}


# Files to take in -------------------------------------------------------------------------------

PIECES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            b"symbol,price,at\n",
            b"EUR,1.5,2024-05-01\n",
            b'"',
            b'""',
            b",",
            b"\r",
            b"\r\n",
            b"\0",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
        ]
    ),
    st.builds(lambda price: f"EUR,{price},2024-05-01\n".encode(), st.floats() | st.integers(-(10**60), 10**60)),
    st.sampled_from(["utf-16", "latin-1", "utf-8-sig"]).map("symbol,price,at\né,1,2024-05-01\n".encode),
    st.sampled_from(
        [
            b'{"symbol":"EUR","price":1.5,"at":"2024-05-01"}\n',
            b'{"symbol":"E\\u0000","price":1e999,"at":"0001-01-01T00:00:00+23:59"}\n',
            b'{"symbol":"EUR","price":1' + b"0" * 5_000 + b',"at":"2024-05-01"}\n',
            b"[" * 3_000,
            b"\n",
        ]
    ),
)
FILES = st.builds(
    lambda head, pieces: head + b"".join(pieces),
    st.sampled_from([b"", b"symbol,price,at\n", b'{"symbol":"EUR","price":1,"at":"2024-05-01"}\n']),
    st.lists(PIECES, max_size=12),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files") / "prices"


@given(data=FILES, format=st.sampled_from(["auto", "csv", "jsonl"]))
@settings(max_examples=examples(200, 28_000))
def test_each_line_of_a_file_is_taken_or_refused_with_its_number(file: Path, data: bytes, format: str) -> None:
    file.write_bytes(data)
    with opened(str(file)) as source, suppress(NotReadable):
        lines = list(prices(source, COLUMNS, format))

        numbers = [number for number, _ in lines]
        assert numbers == sorted(set(numbers))
        for number, found in lines:
            assert isinstance(found, Quote) or (isinstance(found, Refusal) and found.line == number and found.reason)
        if format == "jsonl":
            with opened(str(file)) as source:
                filled = [
                    n for n, line in enumerate(source, 1) if line.removeprefix("\ufeff" if n == 1 else "").strip()
                ]
            assert numbers == filled


@given(data=FILES, format=st.sampled_from(["csv", "jsonl"]), per_transaction=st.integers(1, 5))
@settings(max_examples=examples(30, 2_000))
def test_the_totals_of_a_file_add_up(
    file: Path, sessions: sessionmaker[Session], data: bytes, format: str, per_transaction: int
) -> None:
    file.write_bytes(data)
    with opened(str(file)) as source, suppress(NotReadable):
        summary = ingest(prices(source, COLUMNS, format), sessions, per_transaction=per_transaction)

        assert summary.rows_read == summary.rows_written + len(summary.refused)
