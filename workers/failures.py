"""What is kept of an error: its type, its text without secrets, and a fingerprint that failures of one kind share."""

import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import psycopg
import sqlalchemy.exc

from workers.envelope import Envelope
from workers.masking import masked

_MOST_CHARACTERS = 20_000
_MOST_CAUSES = 5

_LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
# Installed, our own code lies among the libraries.
_OURS = ("domain", "workers")

# What differs between two failures of one kind: quoted values, and every word with a digit in it.
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]*`""")
_WITH_DIGIT = re.compile(r"[\w.,:+@/-]*\d[\w.,:+@/-]*")


class TimeLimitExceeded(Exception):
    """The handler did not end within its route's time limit."""


class UnknownHandler(Exception):
    """No route here has this handler: other code sent the event. Keep it, show it."""


class KilledTheProcess(Exception):
    """Each time this event was at work, the process ended without a word."""


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
    return Failure(
        type=type(error).__qualname__,
        headline=_storable(masked(_cut(f"{type(error).__qualname__}: {_message(error)}"), hidden)).splitlines()[0],
        text=_storable(_cut(masked(_cut("".join(_formatted(error)), 10 * _MOST_CHARACTERS), hidden))),
        fingerprint=fingerprint(error, envelope),
    )


def fingerprint(error: BaseException, envelope: Envelope | None = None) -> str:
    """Return the fingerprint: types, places and messages of the error and its causes, without what varies.

    A place is a file and a function; no line number, so that a deploy does not part a group.
    """
    known = [envelope.aggregate_id, str(envelope.event_id)] if envelope else []
    kind = [(_type(cause), _place(cause), _unvaried(cause, known)) for cause in causes(error)]
    return sha256(repr(kind[:_MOST_CAUSES]).encode("utf-8", "replace")).hexdigest()[:12]


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
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _is_ours(frame.filename)] or list(frames)
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "nowhere"


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
        return _WITH_DIGIT.sub("*", f"{diagnosis.table_name} {diagnosis.constraint_name}") + error.sqlstate
    message = _message(error)
    for value in known:
        message = message.replace(value, "*")
    return _WITH_DIGIT.sub("*", _QUOTED.sub("*", message))[:1_000]


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its text cannot be had"


def _formatted(error: BaseException) -> list[str]:
    try:
        return traceback.format_exception(error)
    except Exception as trouble:
        # An exception of a handler's own making can be anything; its record must not fail for that.
        return [f"{_type(error)}: its traceback cannot be had: {type(trouble).__name__}\n"]


def _sensitive_values(envelope: Envelope) -> Iterator[str]:
    try:
        event = envelope.event
    except Exception:
        return  # it cannot be read, which may be the very error
    for field in fields(event):
        value = getattr(event, field.name)
        if field.metadata.get("sensitive") and value is not None:
            yield str(value)


def _cut(text: str, most: int = _MOST_CHARACTERS) -> str:
    # The end of a traceback names the error: a long one loses its middle.
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}\n...\n{text[-half:]}"


def _storable(text: str) -> str:
    """Postgres keeps no NUL and no lone surrogate."""
    return text.replace("\x00", "\\0").encode("utf-8", "backslashreplace").decode()
