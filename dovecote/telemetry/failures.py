"""What is kept of an error: its type, its text without secrets, and a fingerprint that failures of one kind share.

An error may hold whatever an event holds, or thousands of other errors. What is done with it is bounded: of chains,
groups and tracebacks the nearest members are read, and texts are cut before they are searched (dovecote/masking.py).
"""

import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path

import psycopg
import redis
import sqlalchemy.exc

from dovecote.envelope import Envelope
from dovecote.errors import DovecoteError, cut
from dovecote.masking import masked
from dovecote.unit_of_work import is_conflict as is_conflict_itself

# Characters of a headline, and of a message that a fingerprint is made of.
_MAX_HEADLINE, _MAX_MESSAGE = 1_000, 2_000
# Of an error's causes, a group's members and a traceback's calls so many are kept, the nearest ones.
_MAX_CAUSES, _MAX_MEMBERS, _MAX_CALLS, _MAX_NOTES = 5, 5, 50, 5
_MAX_DEPTH = 2

_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
# Installed, our own code lies among the libraries.
_OURS = ("domain", "workers")

# What differs between two failures of one kind: quoted values, and every word with a digit in it.
_QUOTE = re.compile("['\"`]")
_CLOSED = {
    "'": re.compile(r"(?:[^'\\]|\\.)*'"),
    '"': re.compile(r'(?:[^"\\]|\\.)*"'),
    "`": re.compile("[^`]*`"),
}
_WORD = re.compile(r"[\w.,:+@/-]+")
_DIGIT = re.compile(r"\d")

# SQLSTATE classes and codes of an outage, PostgreSQL manual, appendix A: connection exceptions (08), insufficient
# resources (53), shutdown, crash, start-up, idle session (57P0x, 25P03), read-only after a failover.
_OUTAGE_CLASSES = ("08", "53")
_OUTAGE_CODES = {"57P01", "57P02", "57P03", "57P05", "25P03", "25006"}


class TimeLimitExceeded(DovecoteError):
    """The handler did not end within its route's time limit."""


class UnknownHandler(DovecoteError):
    """No route here has this handler: other code sent the event. Keep it, show it."""


class KilledTheProcess(DovecoteError):
    """The process died each time that this event was in flight."""


@dataclass(frozen=True)
class Failure:
    """An error as operators may read it.

    headline     one line: type and message
    text         the whole traceback, with its causes; never local variables
    fingerprint  12 hexadecimal digits, the same for failures of one kind
    """

    type: str
    headline: str
    text: str
    fingerprint: str


def describe(error: BaseException, envelope: Envelope) -> Failure:
    """Return what may be kept of the error that a handler raised for this event."""
    hidden = list(_sensitive_values(envelope))
    headline = f"{type(error).__qualname__}: {_message(error)}"
    return Failure(
        type=type(error).__qualname__,
        headline=cut(_storable(masked(headline, hidden, _MAX_HEADLINE)).splitlines()[0], _MAX_HEADLINE),
        text=_storable(masked(traceback_of(error), hidden)),
        fingerprint=fingerprint(error, envelope),
    )


def fingerprint(error: BaseException, envelope: Envelope | None = None) -> str:
    """Return the fingerprint: types, places and messages of the error and its causes, without what varies.

    A place is a file and a function; no line number, so that a deploy does not part a group.
    """
    known = [envelope.aggregate_id, str(envelope.event_id)] if envelope else []
    kind = [(_type(cause), _place(cause), _unvaried(cause, known)) for cause in islice(causes(error), _MAX_CAUSES)]
    return sha256(repr(kind).encode("utf-8", "replace")).hexdigest()[:12]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, and those it came from, as a traceback shows them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _type(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _place(error: BaseException) -> str:
    """Where it came from: the innermost function that is no library's."""
    calls = [(frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [call for call in calls if _is_ours(call[0])] or calls
    return f"{Path(ours[-1][0]).name}:{ours[-1][1]}" if ours else "nowhere"


@lru_cache(1_024)
def _is_ours(filename: str) -> bool:
    path = Path(filename)
    if not path.is_absolute():
        return False  # <string>, <frozen importlib>
    inside = [path.relative_to(library).parts[0] for library in _LIBRARIES if path.is_relative_to(library)]
    return all(top in _OURS for top in inside)


def _unvaried(error: BaseException, known: Iterable[str]) -> str:
    if isinstance(error, sqlalchemy.exc.DBAPIError) and error.orig is not None:
        return ""  # Postgres's own words follow: they are its cause
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        diagnosis = error.diag
        # A partition's name has its week in it.
        return _without_digits(f"{diagnosis.table_name} {diagnosis.constraint_name}") + error.sqlstate
    message = _message(error)[:_MAX_MESSAGE]
    for value in known:
        message = message.replace(value, "*")
    return _without_digits(_without_quoted(message))[:1_000]


def _without_digits(text: str) -> str:
    return _WORD.sub(lambda word: "*" if _DIGIT.search(word.group()) else word.group(), text)


def _without_quoted(text: str) -> str:
    parts: list[str] = []
    at, closes = 0, set(_CLOSED)
    while quote := _QUOTE.search(text, at):
        closed = _CLOSED[quote.group()].match(text, quote.end()) if quote.group() in closes else None
        if closed is None:
            # No later quote of its kind is closed either: not looking again is what keeps this linear.
            closes.discard(quote.group())
        parts += [text[at : quote.start()], "*" if closed else quote.group()]
        at = closed.end() if closed else quote.end()
    return "".join([*parts, text[at:]])


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its text cannot be had"


# Its traceback -----------------------------------------------------------------------------------


def traceback_of(error: BaseException) -> str:
    """Return error, causes and members as Python prints them, the nearest ones; never local variables.

    Python's own printing reads every member of a group and every cause first, however many there are.
    """
    return "".join(_formatted(error, _MAX_DEPTH))


def _formatted(error: BaseException, deepest: int) -> Iterator[str]:
    chain = list(islice(causes(error), _MAX_CAUSES + 1))
    if len(chain) > _MAX_CAUSES:
        yield "(what came before is left out)\n\n"
    for place in reversed(range(len(chain[:_MAX_CAUSES]))):
        yield from _alone(chain[place], deepest)
        if place:
            directly = chain[place - 1].__cause__ is chain[place]
            yield f"\n{_DIRECT_CAUSE if directly else _DURING_ANOTHER}\n\n"


_DIRECT_CAUSE = "The above exception was the direct cause of the following exception:"
_DURING_ANOTHER = "During handling of the above exception, another exception occurred:"


def _alone(error: BaseException, deepest: int) -> Iterator[str]:
    if error.__traceback__ is not None:
        yield "Traceback (most recent call last):\n"
        yield from _calls(error)
    message = _message(error)
    yield f"{_type(error).removeprefix('builtins.')}{': ' if message else ''}{message}\n"
    for note in _notes(error):
        yield f"{note}\n"
    if isinstance(error, BaseExceptionGroup):
        yield from _members(error, deepest)


def _calls(error: BaseException) -> list[str]:
    try:
        return traceback.format_tb(error.__traceback__, -_MAX_CALLS)
    except Exception as trouble:
        # A frame's file can be anything; the record of an error must not fail for that.
        return [f"  (its calls cannot be had: {type(trouble).__name__})\n"]


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    return [note for note in notes[:_MAX_NOTES] if isinstance(note, str)] if isinstance(notes, list) else []


def _members(group: BaseExceptionGroup[BaseException], deepest: int) -> Iterator[str]:
    for number, member in enumerate(group.exceptions[: _MAX_MEMBERS if deepest else 0], start=1):
        yield f"    member {number} of {len(group.exceptions)}:\n"
        for text in _formatted(member, deepest - 1):
            yield from (f"    {line}\n" for line in text.splitlines())
    left_out = len(group.exceptions) - (_MAX_MEMBERS if deepest else 0)
    if left_out > 0:
        yield f"    and {left_out} more\n"


def _sensitive_values(envelope: Envelope) -> Iterator[str]:
    try:
        event = envelope.event
    except Exception:
        return  # it cannot be read, which may be the very error
    for field in fields(event):
        value = getattr(event, field.name)
        if field.metadata.get("sensitive") and value is not None:
            yield str(value)


def _storable(text: str) -> str:
    """Postgres keeps no NUL and no lone surrogate."""
    return text.replace("\x00", "\\0").encode("utf-8", "backslashreplace").decode()


# What kind of error it is -------------------------------------------------------------------------


def is_transient(error: BaseException) -> bool:
    """Return whether the error, or one of its causes, says that a server is unavailable. No attempt is spent on it."""
    if any(isinstance(cause, TimeLimitExceeded) for cause in causes(error)):
        return False  # a connection that breaks when a handler is cut off says nothing of its server
    if any(isinstance(cause, psycopg.errors.TransactionTimeout) for cause in causes(error)):
        return False  # our sessions have none: a handler has set one, and it would be too long the next time as well
    return any(_is_outage(cause) for cause in causes(error))


def is_conflict(error: BaseException) -> bool:
    """Return whether two transactions were in each other's way: the same work may succeed at once."""
    return any(
        is_conflict_itself(cause) or isinstance(cause, psycopg.errors.LockNotAvailable) for cause in causes(error)
    )


def _is_outage(error: BaseException) -> bool:
    if isinstance(error, sqlalchemy.exc.TimeoutError | redis.ConnectionError | redis.TimeoutError):
        return True
    if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
        return True
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:  # the connection broke before the server could say why
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate.startswith(_OUTAGE_CLASSES) or error.sqlstate in _OUTAGE_CODES
