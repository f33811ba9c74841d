"""Read prices from a file and take them in through the pricing slice, transaction by transaction.

A bad row is refused with its line number and the reason; it never stops the rest and nothing of it is
written. What a transaction has committed stays, whatever comes after.
"""

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from itertools import chain, islice
from typing import Any

from domain.pricing import Quote, record_quotes
from dovecote.database import Sessions
from dovecote.errors import MAX_SHOWN, DomainError, DovecoteError, cut, shown, shown_error
from dovecote.unit_of_work import unit_of_work


class NotReadable(DovecoteError):
    """The file as a whole is not what was announced; the message says what it is and what to do."""


@dataclass(frozen=True)
class Columns:
    """Which column, or JSON key, holds what."""

    symbol: str
    price: str
    at: str


@dataclass(frozen=True)
class Refusal:
    line: int
    reason: str


@dataclass
class Summary:
    """rows_read = rows_written + refused + those not reached after a stop."""

    rows_read: int = 0
    rows_written: int = 0
    transactions: int = 0
    refused: list[Refusal] = field(default_factory=list)
    last_line_written: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "read": self.rows_read,
            "written": self.rows_written,
            "transactions": self.transactions,
            "last_line_written": self.last_line_written,
            "refused": [{"line": refusal.line, "reason": refusal.reason} for refusal in self.refused],
        }


Line = tuple[int, Quote | Refusal]


def prices(source: Iterable[str], columns: Columns, format: str = "auto") -> Iterator[Line]:
    """Yield line number and quote, or refusal, of each row; `format` is csv, jsonl or auto.

    With auto, a first line that starts with { means JSON lines, anything else CSV.
    Errors: NotReadable when a CSV header is missing or lacks a column.
    """
    lines = iter(source)
    first = list(islice(lines, 1))
    if format == "auto":
        format = "jsonl" if first and first[0].lstrip("\ufeff \t").startswith("{") else "csv"
    read = csv_lines if format == "csv" else json_lines
    yield from read(chain(first, lines), columns)


@contextmanager
def opened(file: str) -> Iterator[Iterable[str]]:
    """Open a file, or standard input for -.

    Bytes that are not UTF-8 survive as surrogates, so that one bad row does not end the file.
    Errors: NotReadable.
    """
    try:
        source = open(  # noqa: SIM115 - only an error of opening is ours to explain
            0 if file == "-" else file, encoding="utf-8", errors="surrogateescape", newline="", closefd=file != "-"
        )
    except OSError as error:
        raise NotReadable(f"it cannot be read: {error.strerror}") from error
    with source:
        yield source


def csv_lines(source: Iterable[str], columns: Columns) -> Iterator[Line]:
    """Yield line number and quote, or refusal, of each CSV row; a row over several lines has its first's.

    Errors: NotReadable when the file is empty or its header lacks a column.
    """
    rows = _csv_rows(source)
    header = _header(rows, columns)
    places = {wanted: header.index(wanted) for wanted in (columns.symbol, columns.price, columns.at)}
    for number, row in rows:
        if isinstance(row, csv.Error):
            yield number, Refusal(number, f"not CSV: {shown_error(row)}")
        elif len(row) != len(header):
            yield number, Refusal(number, f"{len(row)} fields, the header has {len(header)}")
        else:
            yield number, _judged(number, {name: row[place] for name, place in places.items()}, columns)


def _csv_rows(source: Iterable[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield the first line's number and the fields of each row that is not blank, or why it is none.

    A quote that is never closed would swallow every row behind it. So of a row that is not CSV only the
    first line is given up, and reading goes on with the next.
    """
    fresh = enumerate(source, start=1)
    again: deque[tuple[int, str]] = deque()
    taken: list[tuple[int, str]] = []

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else next(fresh, None):
            taken.append(line)
            yield line[1].removeprefix("\ufeff") if line[0] == 1 else line[1]

    while True:
        # A reader of its own for each row: one that has met the end of the file stays there.
        row: list[str] | csv.Error
        try:
            row = next(csv.reader(lines(), strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            row = error
            again.extendleft(reversed(taken[1:]))
        if row:
            yield taken[0][0], row
        taken.clear()


def json_lines(source: Iterable[str], columns: Columns) -> Iterator[Line]:
    """Yield line number and quote, or refusal, of each line, which holds one JSON object."""
    for number, line in enumerate(source, start=1):
        if number == 1:
            line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            # Decimals keep their digits: 0.1 stays 0.1.
            found = json.loads(line, parse_float=Decimal)
        except (ValueError, RecursionError) as error:
            yield number, Refusal(number, f"not JSON: {shown_error(error)}")
            continue
        if not isinstance(found, dict):
            yield number, Refusal(number, f"not a JSON object but {type(found).__name__}")
            continue
        missing = [name for name in (columns.symbol, columns.price, columns.at) if name not in found]
        if missing:
            yield number, Refusal(number, f"no key {shown(missing[0])}")
            continue
        yield number, _judged(number, found, columns)


def ingest(
    lines: Iterable[Line],
    sessions: Sessions,
    *,
    per_transaction: int,
    strict: bool = False,
    progress: Callable[[Summary], None] = lambda _: None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Summary:
    """Write every good line, `per_transaction` at a time; with `strict`, stop at the first bad one.

    What comes before a bad line is written in either case.
    Errors: those of the database; what the summary given to `progress` last counted is committed.
    """
    summary = Summary()
    remaining = iter(lines)
    while chunk := list(islice(remaining, per_transaction)):
        good: list[tuple[int, Quote]] = []
        for number, found in chunk:
            summary.rows_read += 1
            if isinstance(found, Quote):
                good.append((number, found))
                continue
            summary.refused.append(found)
            if strict:
                break
        if good:
            with unit_of_work(sessions) as uow:
                record_quotes(uow, [quote for _, quote in good], now())
            summary.rows_written += len(good)
            summary.transactions += 1
            summary.last_line_written = good[-1][0]
        progress(summary)
        if strict and summary.refused:
            break
    return summary


def _header(rows: Iterator[tuple[int, list[str] | csv.Error]], columns: Columns) -> list[str]:
    _, row = next(rows, (0, None))
    if row is None:
        raise NotReadable("the file is empty: a header line is wanted")
    if isinstance(row, csv.Error):
        raise NotReadable(f"the header is not CSV: {shown_error(row)}")
    header = [name.strip() for name in row]
    for option, wanted in (("--symbol", columns.symbol), ("--price", columns.price), ("--at", columns.at)):
        if header.count(wanted) != 1:
            found = "no" if wanted not in header else "more than one"
            raise NotReadable(f"{option}: the header has {found} column {shown(wanted)}; it has {_columns(header)}")
    return header


def _judged(number: int, fields: Mapping[str, Any], columns: Columns) -> Quote | Refusal:
    try:
        return Quote(
            symbol=_text(fields[columns.symbol], columns.symbol),
            price=_price(fields[columns.price], columns.price),
            as_of=_time(fields[columns.at], columns.at),
        )
    except (DomainError, ValueError) as error:
        return Refusal(number, str(error))


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is not text: {shown(value)}")
    if any("\udc80" <= character <= "\udcff" for character in value):
        raise ValueError(f"{column} is not UTF-8")
    return value.strip()


def _price(value: Any, column: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ValueError(f"{column} is not a number: {shown(value)}")
    try:
        if isinstance(value, str) and "_" in value:
            raise InvalidOperation
        return Decimal(value.strip() if isinstance(value, str) else value)
    except InvalidOperation:
        raise ValueError(f"{column} is not a number: {shown(value)}") from None


def _time(value: Any, column: str) -> datetime:
    if not isinstance(value, str):
        raise ValueError(f"{column} is not a date as text: {shown(value)}")
    try:
        time = datetime.fromisoformat(value.strip())
        # A bare date is midnight UTC.
        return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{column} is not an ISO 8601 date or time: {shown(value)}") from None


def _columns(header: Sequence[str]) -> str:
    return cut(", ".join(shown(name)[1:-1] for name in header[:MAX_SHOWN]), MAX_SHOWN)
