"""Read prices from a file and take them in through the pricing slice, transaction by transaction.

A bad row is refused with its line number and the reason; it never stops the rest and nothing of it is
written. What a transaction has committed stays, whatever comes after.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any, TextIO

from domain.database import Sessions
from domain.errors import DomainError
from domain.pricing import Quote, record_quotes
from domain.unit_of_work import unit_of_work


class NotReadable(Exception):
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


def csv_lines(source: TextIO, columns: Columns) -> Iterator[Line]:
    """Yield line number and quote, or refusal, of each CSV row.

    Errors: NotReadable when the file is empty or its header lacks a column.
    """
    rows = csv.reader(source, strict=True)
    header = _header(rows, columns)
    places = {wanted: header.index(wanted) for wanted in (columns.symbol, columns.price, columns.at)}
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num, Refusal(rows.line_num, f"not CSV: {error}")
            continue
        if not row:
            continue
        if len(row) != len(header):
            yield rows.line_num, Refusal(rows.line_num, f"{len(row)} fields, the header has {len(header)}")
            continue
        yield (
            rows.line_num,
            _judged(rows.line_num, {name: row[place] for name, place in places.items()}, columns),
        )


def json_lines(source: Iterable[str], columns: Columns) -> Iterator[Line]:
    """Yield line number and quote, or refusal, of each line, which holds one JSON object."""
    for number, line in enumerate(source, start=1):
        if not line.strip():
            continue
        try:
            # Decimals keep their digits: 0.1 stays 0.1.
            found = json.loads(line, parse_float=Decimal)
        except (ValueError, RecursionError) as error:
            yield number, Refusal(number, f"not JSON: {error}")
            continue
        if not isinstance(found, dict):
            yield number, Refusal(number, f"not a JSON object but {type(found).__name__}")
            continue
        missing = [name for name in (columns.symbol, columns.price, columns.at) if name not in found]
        if missing:
            yield number, Refusal(number, f"no key {missing[0]!r}")
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


def _header(rows: Any, columns: Columns) -> list[str]:
    try:
        header = [name.strip() for name in next(rows)]
    except StopIteration:
        raise NotReadable("the file is empty: a header line is wanted") from None
    except csv.Error as error:
        raise NotReadable(f"the header is not CSV: {error}") from None
    if header:
        header[0] = header[0].removeprefix("\ufeff")
    for option, wanted in (("--symbol", columns.symbol), ("--price", columns.price), ("--at", columns.at)):
        if header.count(wanted) != 1:
            found = "no" if wanted not in header else "more than one"
            raise NotReadable(f"{option}: the header has {found} column {wanted!r}; it has {', '.join(header)}")
    return header


def _judged(number: int, fields: Mapping[str, Any], columns: Columns) -> Quote | Refusal:
    try:
        return Quote(
            symbol=_text(fields[columns.symbol], columns.symbol),
            price=_price(fields[columns.price], columns.price),
            as_of=_moment(fields[columns.at], columns.at),
        )
    except (DomainError, ValueError) as error:
        return Refusal(number, str(error))


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column} is not text: {value!r}")
    if any("\udc80" <= character <= "\udcff" for character in value):
        raise ValueError(f"{column} is not UTF-8")
    return value.strip()


def _price(value: Any, column: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ValueError(f"{column} is not a number: {value!r}")
    try:
        if isinstance(value, str) and "_" in value:
            raise InvalidOperation
        return Decimal(value.strip() if isinstance(value, str) else value)
    except InvalidOperation:
        raise ValueError(f"{column} is not a number: {str(value)[:60]!r}") from None


def _moment(value: Any, column: str) -> datetime:
    if not isinstance(value, str):
        raise ValueError(f"{column} is not a date as text: {value!r}")
    try:
        moment = datetime.fromisoformat(value.strip())
        # A bare date is midnight UTC.
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{column} is not an ISO 8601 date or time: {value[:60]!r}") from None
