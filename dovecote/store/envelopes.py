"""Fetch envelopes from Postgres with a bound in bytes, and skip rows that have none.

A statement that reads returns the envelopes of small rows. For a row that is large or compressed it returns the event's
id instead: the size of its text is not known before it is made. Those come from `dovecote.envelopes`, some at a time,
each made separately. So a row whose envelope cannot be made is known, with the reason, and does not stop the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Generic, TypeVar

import psycopg
import structlog
from psycopg.rows import TupleRow

from dovecote.masking import masked

Connection = psycopg.Connection[TupleRow]

#: One event: its position, its type, and its CloudEvents JSON in UTF-8. A plain tuple, as psycopg makes it in C.
#: Without a byte of JSON it is an event whose envelope cannot be made: it is in no message.
Row = tuple[int, str, bytes]

log = structlog.get_logger()

Item = TypeVar("Item")
Result = TypeVar("Result")

# Bytes of one result of `dovecote.envelopes`: Postgres keeps it in memory as a whole, below its work_mem.
_ANSWER_BYTES = 2_000_000
# Ids of one statement.
_ASKED_IDS = 100
# Most events of a batch without an envelope: to find out that a text is far too large may take a tenth of a second.
_PROBLEMS = 20
# What stands for an envelope that is still to be fetched: the event's id. No envelope is so short.
_ID_BYTES = 16

# The ids go as the bytes they came as: making UUIDs of them would take longer than all else done with them here.
_ENVELOPES = """
    select envelope, problem from dovecote.envelopes(
        array(select encode(substring(ids, 16 * place + 1, 16), 'hex')::uuid
              from (select %s::bytea as ids) as asked, generate_series(0, octet_length(ids) / 16 - 1) as place
              order by place), %s)
"""


def bounded(select: str) -> str:
    """Return the statement that reads what `select` does, in order of position, with the bytes for an envelope last.

    `select` yields `position`, `event_type`, `id` and, as `envelope`, the text or null, and has a limit. The statement
    takes one parameter more, the first: the most bytes of one envelope. That times the limit is what it may bring.
    """
    return f"""
    select position, event_type,
           case when octet_length(envelope) <= %s then convert_to(envelope, 'UTF8') else uuid_send(id) end
    from ({select}) as read order by position
    """  # noqa: S608 - put together from constants


def without_envelopes(query: str) -> str:
    """Return the statement with an id in place of every envelope: no envelope makes it fail."""
    return query.replace("dovecote.small_envelope(o)", "null::text")


def past_unreadable(connection: Connection, query: str, run: Callable[[str], Result]) -> Result:
    """Run a statement that reads envelopes; if it fails, once more without them: with an id in place of each.

    Then no envelope makes it fail; which of them cannot be made shows when they are fetched.
    Errors: psycopg.Error when the connection is lost, or when something else is wrong.
    """
    try:
        return run(query)
    except psycopg.Error as error:
        if connection.closed:
            raise
        log.warning("reading row by row", error=masked(f"{type(error).__name__}: {error}"))
        return run(without_envelopes(query))


@dataclass(frozen=True)
class Made(Generic[Item]):
    """Something and its envelope. Without a byte, `problem` says why there is none."""

    item: Item
    envelope: bytes
    problem: str | None


@dataclass(frozen=True)
class Read:
    """Rows as far as there was room.

    is_cut    more may match
    problems  position -> why the row there has no envelope
    """

    rows: list[Row]
    is_cut: bool = False
    problems: dict[int, str] = field(default_factory=dict)

    def within(self, max_bytes: int) -> "Read":
        """Return as many of the rows, from the first on, as have no more bytes; none may."""
        if self.bytes <= max_bytes:
            return self
        kept = 0
        for _, _, envelope in self.rows:
            max_bytes -= len(envelope)
            if max_bytes < 0:
                break
            kept += 1
        rows = self.rows[:kept]
        known = {position for position, _, _ in rows} if self.problems else ()
        problems = {position: problem for position, problem in self.problems.items() if position in known}
        return Read(rows, True, problems)

    @property
    def bytes(self) -> int:
        return sum(len(envelope) for _, _, envelope in self.rows)


class Envelopes:
    """Reads rows with their envelopes on one connection, at most so many bytes at a time.

    max_rows         rows of one statement
    max_small_bytes  of an envelope that comes with its row; all of them together have no more than `max_bytes`
    """

    def __init__(self, connection: Connection, max_rows: int, max_bytes: int) -> None:
        self._connection = connection
        self.max_bytes = max_bytes
        # An envelope has 400 bytes at least.
        self.max_rows = max(1, min(max_rows, max_bytes // 1_000))
        self.max_small_bytes = max_bytes // self.max_rows
        self._row_by_row = False

    def read(self, query: str, *parameters: object) -> Read:
        """Return the rows of a `bounded` statement: as many as there is room for, and at least one."""
        # After one that could not be read there may be more, and a statement would try all of them.
        query = without_envelopes(query) if self._row_by_row else query
        rows = past_unreadable(self._connection, query, lambda query: self._select(query, parameters))
        self._row_by_row = False
        is_cut = len(rows) == self.max_rows
        if not rows or min(map(len, map(itemgetter(2), rows))) > _ID_BYTES:
            return Read(rows, is_cut)
        kept: list[Row] = []
        size = 0
        problems: dict[int, str] = {}
        made = self.made([envelope for _, _, envelope in rows])
        for (position, event_type, _), (envelope, problem) in zip(rows, made, strict=True):
            size += len(envelope)
            if (kept and size > self.max_bytes) or len(problems) == _PROBLEMS:
                return Read(kept, True, problems)
            if problem is not None:
                self._row_by_row = True
                problems[position] = problem
            kept.append((position, event_type, envelope))
        return Read(kept, is_cut, problems)

    def in_parts(self, items: Sequence[Item], given: Sequence[bytes]) -> Iterator[list[Made[Item]]]:
        """Yield all items with their envelopes, in order, so many bytes at a time.

        `given` has for each item its envelope, or the event's id in 16 bytes.
        """
        part: list[Made[Item]] = []
        size = 0
        for item, (envelope, problem) in zip(items, self.made(given), strict=True):
            if part and size + len(envelope) > self.max_bytes:
                yield part
                part, size = [], 0
            part.append(Made(item, envelope, problem))
            size += len(envelope)
        if part:
            yield part

    def made(self, given: Sequence[bytes]) -> Iterator[tuple[bytes, str | None]]:
        """Yield each envelope; where an id is given, the one that belongs to it, or nothing and the reason why."""
        fetched = self._fetched([one for one in given if len(one) == _ID_BYTES])
        for one in given:
            yield next(fetched) if len(one) == _ID_BYTES else (one, None)

    def _fetched(self, ids: Sequence[bytes]) -> Iterator[tuple[bytes, str | None]]:
        at = 0
        while at < len(ids):
            with self._connection.cursor(binary=True) as cursor:
                asked = b"".join(ids[at : at + _ASKED_IDS])
                answers = cursor.execute(_ENVELOPES, (asked, _ANSWER_BYTES)).fetchall()
            at += len(answers)
            for envelope, problem in answers:
                yield envelope or b"", problem

    def _select(self, query: str, parameters: Sequence[object]) -> list[Row]:
        with self._connection.cursor(binary=True) as cursor:
            rows: list[Row] = cursor.execute(query, (self.max_small_bytes, *parameters)).fetchall()
        return rows
