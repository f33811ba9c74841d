"""Prices from files: what goes in, what is refused and on which line, and that one never hurts the other."""

import csv
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session, sessionmaker

from domain.pricing import Quote
from dovecote.settings import Settings
from tests.conftest import Servers
from tests.support import commands
from tests.support.processes import eventually
from tests.support.system import system_for
from workers.gateways.price_files import Columns, NotReadable, Refusal, csv_lines, ingest, json_lines
from workers.routes import ROUTES

ROOT = Path(__file__).parents[3]
RATES = ROOT.parent / "shared" / "data" / "fx_monthly.csv"

COLUMNS = Columns(symbol="symbol", price="price", at="at")
HEADER = "symbol,price,at\n"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)

Found = dict[int, str]


def from_csv(text: str, columns: Columns = COLUMNS) -> tuple[Found, Found]:
    """Symbols and reasons by line number."""
    return _sorted(csv_lines(io.StringIO(text, newline=""), columns))


def from_json(text: str, columns: Columns = COLUMNS) -> tuple[Found, Found]:
    return _sorted(json_lines(io.StringIO(text, newline=""), columns))


def _sorted(lines: Iterator[tuple[int, Quote | Refusal]]) -> tuple[Found, Found]:
    found = list(lines)
    assert all(number == line.line for number, line in found if isinstance(line, Refusal))
    assert [number for number, _ in found] == sorted({number for number, _ in found})
    return (
        {number: line.symbol for number, line in found if isinstance(line, Quote)},
        {number: line.reason for number, line in found if isinstance(line, Refusal)},
    )


# What goes in ------------------------------------------------------------------------------------


def test_columns_are_found_by_name_wherever_they_are() -> None:
    source = io.StringIO('Rate,Note,Day,Country\n1.10,"said ""so"",\nand so",2024-05-01,Latvia\n')

    ((number, quote),) = csv_lines(source, Columns(symbol="Country", price="Rate", at="Day"))

    assert number == 2
    assert quote == Quote(symbol="Latvia", price=Decimal("1.10"), as_of=datetime(2024, 5, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("text", "as_of"),
    [
        ("2024-05-01", datetime(2024, 5, 1, tzinfo=UTC)),
        ("2024-05-01T12:30", datetime(2024, 5, 1, 12, 30, tzinfo=UTC)),
        ("2024-05-01 12:30:15.25", datetime(2024, 5, 1, 12, 30, 15, 250_000, tzinfo=UTC)),
        ("2024-05-01T12:30+02:00", datetime(2024, 5, 1, 10, 30, tzinfo=UTC)),
        ("2024-05-01T12:30Z", datetime(2024, 5, 1, 12, 30, tzinfo=UTC)),
        (" 2024-05-01 ", datetime(2024, 5, 1, tzinfo=UTC)),
    ],
)
def test_a_time_without_a_zone_is_utc(text: str, as_of: datetime) -> None:
    ((_, quote),) = csv_lines(io.StringIO(f"{HEADER}EUR,1,{text}\n"), COLUMNS)

    assert isinstance(quote, Quote)
    assert quote.as_of == as_of


def test_a_price_keeps_its_digits_as_text_and_as_json_number() -> None:
    digits = "12345678901234567890.123456789012345678"

    ((_, by_csv),) = csv_lines(io.StringIO(f"{HEADER}EUR, {digits} ,2024-05-01\n"), COLUMNS)
    ((_, by_json),) = json_lines([f'{{"symbol": "EUR", "price": {digits}, "at": "2024-05-01"}}'], COLUMNS)

    assert isinstance(by_csv, Quote)
    assert by_csv.price == Decimal(digits)
    assert by_json == by_csv


@pytest.mark.parametrize("header", ['\ufeff"symbol","price","at"', "\ufeffsymbol,price,at", " symbol , price , at "])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_and_any_line_ending_are_taken(header: str, ending: str) -> None:
    written, refused = from_csv(ending.join([header, "EUR,1,2024-05-01", "USD,2,2024-05-01"]))

    assert (written, refused) == ({2: "EUR", 3: "USD"}, {})


def test_json_with_a_byte_order_mark_is_taken() -> None:
    assert from_json('\ufeff{"symbol": "EUR", "price": "1", "at": "2024-05-01"}\n') == ({1: "EUR"}, {})


def test_blank_lines_are_no_rows() -> None:
    assert from_csv(f"\n{HEADER}\n\nEUR,1,2024-05-01\n\n") == ({5: "EUR"}, {})
    assert from_json('\n{"symbol": "EUR", "price": "1", "at": "2024-05-01"}\n \n') == ({2: "EUR"}, {})


# What ends the reading at once -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("symbol,at\nEUR,2024-05-01\n", "--price: the header has no column 'price'; it has symbol, at"),
        ("symbol,price,price,at\n", "--price: the header has more than one column 'price'"),
        ("Symbol,price,at\n", "--symbol: the header has no column 'symbol'"),
        ('symbol,price,"at\n', "the header is not CSV"),
        ("x" * 10_000 + "\n", "the header has no column 'symbol'"),
    ],
)
def test_a_header_that_does_not_fit_is_said_and_nothing_is_read(text: str, says: str) -> None:
    with pytest.raises(NotReadable) as refusal:
        from_csv(text)

    assert says in str(refusal.value)
    assert len(str(refusal.value)) < 300


# What is refused, and what is not because of it --------------------------------------------------

BAD_ROWS = {
    "a field too few": ("EUR,1", "2 fields, the header has 3"),
    "a field too many": ("EUR,1,2024-05-01,x", "4 fields, the header has 3"),
    "nothing in it": (",,", "price is not a number: ''"),
    "no symbol": (",1,2024-05-01", "a symbol has 1 to 100 printable characters"),
    "a symbol of blanks": ("   ,1,2024-05-01", "a symbol has 1 to 100 printable characters"),
    "a long symbol": (f"{'E' * 101},1,2024-05-01", "a symbol has 1 to 100 printable characters"),
    "a NUL": ("E\0UR,1,2024-05-01", "a symbol has 1 to 100 printable characters"),
    "an escape sequence": ("E\x1b[31m,1,2024-05-01", "a symbol has 1 to 100 printable characters"),
    "not UTF-8": ("E\udcffR,1,2024-05-01", "symbol is not UTF-8"),
    "no price": ("EUR,,2024-05-01", "price is not a number: ''"),
    "a price in words": ("EUR,one,2024-05-01", "price is not a number: 'one'"),
    "a decimal comma": ('EUR,"1,5",2024-05-01', "price is not a number: '1,5'"),
    "an underscore": ("EUR,1_000,2024-05-01", "price is not a number: '1_000'"),
    "not a number": ("EUR,NaN,2024-05-01", "a price is a positive number, got NaN"),
    "a signalling one": ("EUR,sNaN,2024-05-01", "a price is a positive number, got sNaN"),
    "infinite": ("EUR,inf,2024-05-01", "a price is a positive number, got Infinity"),
    "zero": ("EUR,0,2024-05-01", "a price is a positive number, got 0"),
    "negative": ("EUR,-1,2024-05-01", "a price is a positive number, got -1"),
    "21 digits": (f"EUR,{'9' * 21},2024-05-01", "at most 20 digits and 18 decimals"),
    "19 decimals": ("EUR,0.0000000000000000001,2024-05-01", "at most 20 digits and 18 decimals"),
    "a huge exponent": ("EUR,1e999999999,2024-05-01", "at most 20 digits and 18 decimals"),
    "no date": ("EUR,1,", "at is not an ISO 8601 date or time: ''"),
    "a date of elsewhere": ("EUR,1,01.05.2024", "at is not an ISO 8601 date or time: '01.05.2024'"),
    "a day that never was": ("EUR,1,2023-02-29", "at is not an ISO 8601 date or time: '2023-02-29'"),
    "before the year 1": ("EUR,1,0001-01-01T00:00+14:00", "at is not an ISO 8601 date or time"),
    "a huge field": (f"EUR,1,2024-05-01{'x' * 140_000}", "not CSV: field larger than field limit"),
    "a huge price": (f"EUR,{'x' * 100_000},2024-05-01", "price is not a number: 'xxx"),
    "text behind a quote": ('"EUR"x,1,2024-05-01', "not CSV: ',' expected after '\"'"),
    "a quote never closed": ('"EUR,1,2024-05-01', "not CSV"),
    "a symbol of two lines": ('"EU\nR",1,2024-05-01', "a symbol has 1 to 100 printable characters"),
    "a price of two lines": ('EUR,"1\n2",2024-05-01', "price is not a number"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_and_its_neighbours_go_in(row: str, reason: str) -> None:
    lines = row.count("\n") + 1

    written, refused = from_csv(f'{HEADER}A,1,2024-05-01\nB,2,2024-05-01\n{row}\nC,3,2024-05-01\n"D",4,2024-05-01\n')

    assert written == {2: "A", 3: "B", 4 + lines: "C", 5 + lines: "D"}
    assert list(refused) == [4]
    assert reason in refused[4]
    assert len(refused[4]) < 300


def test_a_quote_never_closed_costs_one_line_even_among_thousands() -> None:
    rows = [f"S{n},1,2024-05-01" for n in range(20_000)]
    rows[7_000] = '"' + rows[7_000]

    written, refused = from_csv(HEADER + "\n".join(rows))

    assert len(written) == 19_999
    assert list(refused) == [7_002]


BAD_LINES = {
    "not JSON": ("EUR 1", "not JSON"),
    "half of it": ('{"symbol": "EUR", "price"', "not JSON"),
    "not an object": ('["EUR", 1, "2024-05-01"]', "not a JSON object but list"),
    "a number": ("1", "not a JSON object but int"),
    "nested too deep": ("[" * 100_000, "not JSON"),
    "a missing key": ('{"symbol": "EUR", "price": 1}', "no key 'at'"),
    "a symbol that is a number": ('{"symbol": 1, "price": 1, "at": "2024-05-01"}', "symbol is not text: 1"),
    "half a character": ('{"symbol": "\\ud800", "price": 1, "at": "2024-05-01"}', "printable characters"),
    "a NUL": ('{"symbol": "E\\u0000", "price": 1, "at": "2024-05-01"}', "printable characters"),
    "a price that is yes": ('{"symbol": "EUR", "price": true, "at": "2024-05-01"}', "price is not a number: True"),
    "a price that is nothing": ('{"symbol": "EUR", "price": null, "at": "2024-05-01"}', "price is not a number: None"),
    "NaN": ('{"symbol": "EUR", "price": NaN, "at": "2024-05-01"}', "price is not a number: nan"),
    "too many digits": ('{"symbol": "EUR", "price": 1' + "0" * 5_000 + ', "at": "2024-05-01"}', "not JSON"),
    "a price as large object": (
        json.dumps({"symbol": "EUR", "price": {"a": "b" * 9_999}, "at": "2024-05-01"}),
        "price is not a number: {'a': 'bbb",
    ),
    "a date that is a number": ('{"symbol": "EUR", "price": 1, "at": 20240501}', "at is not a date as text: 20240501"),
    "not UTF-8": ('{"symbol": "E\udcff", "price": 1, "at": "2024-05-01"}', "symbol is not UTF-8"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_of_json_is_refused_and_its_neighbours_go_in(line: str, reason: str) -> None:
    good = '{"symbol": "GOOD", "price": "1.5", "at": "2024-05-01", "more": [1]}'

    written, refused = from_json(f"{good}\n{line}\n{good}\n")

    assert written == {1: "GOOD", 3: "GOOD"}
    assert list(refused) == [2]
    assert reason in refused[2]
    assert len(refused[2]) < 300


# Transactions ------------------------------------------------------------------------------------


def a_file(count: int, bad: Sequence[int] = ()) -> io.StringIO:
    """A CSV with `count` rows; those in `bad` (from 0) have no price."""
    rows = [f"S{n},{'' if n in bad else n + 1},2024-05-01" for n in range(count)]
    return io.StringIO(HEADER + "\n".join(rows))


def written_symbols(sessions: sessionmaker[Session]) -> list[str]:
    with sessions() as session:
        query = "select aggregate_id from dovecote.outbox order by position"
        return [row[0] for row in session.connection().exec_driver_sql(query)]


@pytest.fixture
def clean(sessions: sessionmaker[Session]) -> sessionmaker[Session]:
    with sessions() as session, session.begin():
        session.connection().exec_driver_sql("truncate dovecote.outbox, dovecote.price_quotes")
    return sessions


@pytest.mark.parametrize(("per_transaction", "transactions"), [(1, 10), (3, 4), (5, 2), (10, 1), (1_000, 1)])
def test_rows_are_written_so_many_to_a_transaction(
    clean: sessionmaker[Session], per_transaction: int, transactions: int
) -> None:
    summary = ingest(csv_lines(a_file(10), COLUMNS), clean, per_transaction=per_transaction)

    assert (summary.rows_read, summary.rows_written, summary.transactions) == (10, 10, transactions)
    with clean() as session:
        query = "select count(distinct xmin::text) from dovecote.outbox"
        assert session.connection().exec_driver_sql(query).scalar_one() == transactions
    assert written_symbols(clean) == [f"S{n}" for n in range(10)]


def test_the_good_rows_of_a_half_bad_transaction_are_written(clean: sessionmaker[Session]) -> None:
    summary = ingest(csv_lines(a_file(10, bad=[1, 3, 5, 7, 9]), COLUMNS), clean, per_transaction=4)

    assert (summary.rows_read, summary.rows_written, summary.transactions) == (10, 5, 3)
    assert [refusal.line for refusal in summary.refused] == [3, 5, 7, 9, 11]
    assert written_symbols(clean) == ["S0", "S2", "S4", "S6", "S8"]


def test_a_transaction_of_bad_rows_only_is_none(clean: sessionmaker[Session]) -> None:
    summary = ingest(csv_lines(a_file(4, bad=[0, 1]), COLUMNS), clean, per_transaction=2)

    assert (summary.rows_written, summary.transactions, summary.last_line_written) == (2, 1, 5)


def test_strict_writes_what_comes_before_the_first_bad_row_and_stops(clean: sessionmaker[Session]) -> None:
    summary = ingest(csv_lines(a_file(10, bad=[5, 6]), COLUMNS), clean, per_transaction=4, strict=True)

    assert (summary.rows_read, summary.rows_written, len(summary.refused)) == (6, 5, 1)
    assert (summary.refused[0].line, summary.last_line_written) == (7, 6)
    assert written_symbols(clean) == ["S0", "S1", "S2", "S3", "S4"]


def test_the_same_quote_twice_in_one_file_is_two_events_and_the_last_one_counts(clean: sessionmaker[Session]) -> None:
    source = io.StringIO(f"{HEADER}EUR,1,2024-05-01\nEUR,2,2024-05-01\n")

    ingest(csv_lines(source, COLUMNS), clean, per_transaction=500)

    assert written_symbols(clean) == ["EUR", "EUR"]
    with clean() as session:
        query = "select price::text from dovecote.price_quotes where symbol = 'EUR'"
        assert Decimal(session.connection().exec_driver_sql(query).scalar_one()) == 2


# Anything at all ---------------------------------------------------------------------------------

# What breaks readers, more often than chance would bring it.
FRAGMENTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            ",",
            "\n",
            "\r",
            "\r\n",
            '"',
            '""',
            "\0",
            "\ufeff",
            "EUR",
            "1.5",
            "-1",
            "NaN",
            "2024-05-01",
            "\udcff",
            "{",
            "}",
        ]
    ),
    st.builds(lambda symbol, price: f"{symbol},{price},2024-05-01\n", st.text(max_size=5), st.decimals()),
    st.builds(
        lambda symbol, price, at: json.dumps({"symbol": symbol, "price": price, "at": at}) + "\n",
        st.text(max_size=5) | st.integers() | st.none(),
        st.floats() | st.integers() | st.text(max_size=5) | st.booleans(),
        st.datetimes().map(str) | st.text(max_size=5) | st.none(),
    ),
)
ANYTHING = st.lists(FRAGMENTS, max_size=40).map("".join)

Reader = Callable[[str], Iterator[tuple[int, Quote | Refusal]]]


def csv_reader(text: str) -> Iterator[tuple[int, Quote | Refusal]]:
    return csv_lines(io.StringIO(HEADER + text, newline=""), COLUMNS)


def json_reader(text: str) -> Iterator[tuple[int, Quote | Refusal]]:
    return json_lines(io.StringIO(text, newline=""), COLUMNS)


@pytest.mark.parametrize("reader", [csv_reader, json_reader])
@given(text=ANYTHING)
@settings(max_examples=500, deadline=None)
def test_whatever_a_file_holds_each_row_is_a_quote_or_a_refusal(reader: Reader, text: str) -> None:
    lines = [number for number, _ in reader(text)]

    assert lines == sorted(set(lines))


@given(text=ANYTHING)
@settings(max_examples=200, deadline=None)
def test_whatever_a_file_begins_with_it_is_read_or_called_unreadable(text: str) -> None:
    with suppress(NotReadable):
        list(csv_lines(io.StringIO(text, newline=""), COLUMNS))


@pytest.mark.parametrize("reader", [csv_reader, json_reader])
@given(text=ANYTHING, per_transaction=st.integers(1, 5), strict=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_what_was_read_was_written_or_refused(
    clean: sessionmaker[Session], reader: Reader, text: str, per_transaction: int, strict: bool
) -> None:
    before = len(written_symbols(clean))

    summary = ingest(reader(text), clean, per_transaction=per_transaction, strict=strict)

    assert summary.rows_read == summary.rows_written + len(summary.refused)
    assert len(written_symbols(clean)) - before == summary.rows_written


# The command -------------------------------------------------------------------------------------


def ingest_prices(
    home: Path, database_url: str, *arguments: str, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    return commands.run(["ingest", "prices", *arguments], environment(home, database_url), home, stdin)


def environment(home: Path, database_url: str) -> Mapping[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "DOVECOTE_APP": "workers.app:app",
        "PYTHONPATH": str(ROOT),
        "DOVECOTE_HOME": str(home),
        "DATABASE_URL": database_url,
    }


MIXED = (
    b"\xef\xbb\xbfsymbol,price,at\r\nEUR,1.5,2024-05-01\r\n"
    b"\xff\xfe,1,2024-05-01\r\nUSD,-1,2024-05-01\r\nJPY,9,2024-05-01\r\n"
)


def test_the_summary_for_people_names_the_refused_lines(tmp_path: Path, database_url: str) -> None:
    (tmp_path / "mixed.csv").write_bytes(MIXED)

    done = ingest_prices(tmp_path, database_url, "mixed.csv")

    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == [
        "4 rows read, 2 written in 1 transactions, 2 refused",
        "  line 3: symbol is not UTF-8",
        "  line 4: a price is a positive number, got -1",
    ]


def test_the_summary_for_machines_holds_the_same(tmp_path: Path, database_url: str) -> None:
    (tmp_path / "mixed.csv").write_bytes(MIXED)

    done = ingest_prices(tmp_path, database_url, "mixed.csv", "--json", "--per-transaction", "1")

    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "read": 4,
        "written": 2,
        "transactions": 2,
        "last_line_written": 5,
        "refused": [
            {"line": 3, "reason": "symbol is not UTF-8"},
            {"line": 4, "reason": "a price is a positive number, got -1"},
        ],
    }


def test_strict_ends_with_exit_code_1(tmp_path: Path, database_url: str) -> None:
    (tmp_path / "mixed.csv").write_bytes(MIXED)

    done = ingest_prices(tmp_path, database_url, "mixed.csv", "--strict", "--json")

    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert (summary["read"], summary["written"], len(summary["refused"])) == (2, 1, 1)


@pytest.mark.parametrize("more", [[], ["--format", "jsonl"]])
def test_standard_input_may_be_json_lines(tmp_path: Path, database_url: str, more: list[str]) -> None:
    lines = b'{"symbol": "EUR", "price": 1.10, "at": "2024-05-01"}\nnot json\n'

    done = ingest_prices(tmp_path, database_url, "-", "--json", *more, stdin=lines)

    summary = json.loads(done.stdout)
    assert (summary["read"], summary["written"], summary["last_line_written"]) == (2, 1, 1)


@pytest.mark.parametrize("more", [[], ["--format", "csv"]])
def test_standard_input_may_be_csv(tmp_path: Path, database_url: str, more: list[str]) -> None:
    done = ingest_prices(tmp_path, database_url, "-", "--json", *more, stdin=MIXED)

    summary = json.loads(done.stdout)
    assert (summary["read"], summary["written"], summary["last_line_written"]) == (4, 2, 5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.csv"], "nowhere.csv: it cannot be read: No such file or directory"),
        (["other.csv"], "other.csv: --symbol: the header has no column 'symbol'; it has a, b"),
        (["."], ".: it cannot be read: Is a directory"),
        (["utf16.csv"], "utf16.csv: --symbol: the header has no column 'symbol'"),
    ],
)
def test_what_cannot_be_read_ends_with_exit_code_2_and_one_sentence(
    tmp_path: Path, database_url: str, arguments: list[str], says: str
) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "utf16.csv").write_text(HEADER, encoding="utf-16")

    done = ingest_prices(tmp_path, database_url, *arguments)

    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"dovecote: {says}")
    assert b"Traceback" not in done.stderr


def test_when_postgres_goes_away_it_is_said_how_many_rows_are_in(tmp_path: Path, fresh_database_url: str) -> None:
    rows = "".join(f"S{n},1,2024-05-01\n" for n in range(100_000)).encode()
    half = len(rows) // 2
    with (
        psycopg.connect(fresh_database_url, autocommit=True) as watching,
        subprocess.Popen(
            [sys.executable, "-m", "dovecote", "ingest", "prices", "-", "--format", "csv", "--per-transaction", "100"],
            env=environment(tmp_path, fresh_database_url),
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as running,
    ):
        assert running.stdin
        assert running.stdout
        assert running.stderr
        running.stdin.write(HEADER.encode() + rows[:half])
        running.stdin.flush()
        eventually(lambda: count_of(watching, "dovecote.outbox") > 1_000, 20, "the first rows written")
        watching.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        with suppress(BrokenPipeError):
            running.stdin.write(rows[half:])
            running.stdin.close()
        printed = running.stderr.read().decode()
        assert running.wait(20) == 1
        count = count_of(watching, "dovecote.outbox")

    first, second = printed.splitlines()
    said = int(first.split()[1])
    assert first == (
        f"dovecote: {said} rows are in, up to line {said + 1}; "
        "of the rest none is, or the next transaction of at most 100 rows"
    )
    assert second.startswith("dovecote: Postgres is not there: ")
    assert said > 0
    assert said % 100 == 0
    assert count in (said, said + 100)


def count_of(connection: psycopg.Connection[Any], table: str) -> int:
    row = connection.execute(f"select count(*) from {table}").fetchone()
    return int(row[0]) if row else 0


# The real thing ----------------------------------------------------------------------------------


@pytest.mark.skipif(not RATES.exists(), reason="the exchange rates are not beside this checkout")
def test_the_exchange_rates_arrive_whole_once_and_with_the_newest_price(
    settings: Settings, servers: Servers, tmp_path: Path
) -> None:
    url = settings.database.url.get_secret_value()
    options = ["--symbol", "Country", "--price", "Exchange rate", "--at", "Date", "--json"]

    with system_for(settings, ROUTES) as system, system.running():
        done = ingest_prices(tmp_path, url, str(RATES), *options)
        status = system.until_quiet(60)

    summary = json.loads(done.stdout)
    assert (summary["read"], summary["written"], summary["refused"]) == (17_237, 17_237, [])
    assert (status.relay.published, status.relay.lag_events) == (17_237, 0)
    applied = status.handlers["pricing.apply_quotes"]
    assert (applied.processed, applied.retrying, applied.waiting, applied.dead) == (17_237, 0, 0, 0)
    with psycopg.connect(url) as connection:
        found = connection.execute("select symbol, as_of, price, quotes_applied from dovecote.latest_prices").fetchall()
    assert {symbol: (as_of, price) for symbol, as_of, price, _ in found} == newest_of(RATES)
    assert {symbol: applied for symbol, _, _, applied in found} == rows_by_symbol(RATES)


def newest_of(file: Path) -> dict[str, tuple[datetime, Decimal]]:
    newest: dict[str, tuple[datetime, Decimal]] = {}
    with file.open(encoding="utf-8", newline="") as source:
        for row in csv.DictReader(source):
            day = datetime.strptime(row["Date"], "%Y-%m-%d").replace(tzinfo=UTC)
            if row["Country"] not in newest or day >= newest[row["Country"]][0]:
                newest[row["Country"]] = (day, Decimal(row["Exchange rate"]))
    return newest


def rows_by_symbol(file: Path) -> Mapping[str, int]:
    with file.open(encoding="utf-8", newline="") as source:
        return Counter(row["Country"] for row in csv.DictReader(source))
