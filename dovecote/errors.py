"""The small tree of errors; each branch says what the caller should do next. And values as an error may show them.

`repr` and `str` of a value from outside are neither short nor cheap: an integer of 5,000 digits makes them raise, a
list in a list in a list makes them recurse, and a text of 250,000 characters ends up in a message, a log and a row.
`shown` is short, on one line, and cheap however large the value is.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import ClassVar

MAX_SHOWN = 80
MAX_SHOWN_ERROR = 200

_MAX_DEPTH = 2
_MAX_ITEMS = 4
# Of a larger integer only the size is shown: writing it in decimal takes time quadratic in its digits.
_MAX_BITS = 256


class DovecoteError(Exception):
    """The root of every exception that this package raises on purpose, those that steer a process included.

    One is none of these, because no `except Exception` of a handler may catch it: dovecote.consumer.time_limits.CutOff.
    Private ones (`_Name`), which never leave their module, need not be.

    exit_code  of a command that ends with it: 1 the work failed, 2 the command or a setting is wrong
    """

    exit_code: ClassVar[int] = 1


class DomainError(DovecoteError):
    """The business said no. Asking again gives the same answer: do not retry."""


class Refused(DomainError):
    """The thing exists but is in no state for this."""


class RateLimited(Refused):
    """Too many requests lately. Trying again before `retry_at` is refused, and does not extend the wait.

    retry_after  how long to wait, from the time that the caller gave; above zero
    retry_at     the end of that wait
    """

    why: ClassVar[str] = "too many requests"

    def __init__(self, at: datetime, retry_at: datetime) -> None:
        self.retry_after = retry_at - at
        self.retry_at = retry_at
        seconds = -(-self.retry_after // timedelta(seconds=1))
        super().__init__(f"{self.why}; try again in {seconds} s, at {retry_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC")


class NotFound(DomainError):
    """There is no such thing."""


class InvalidValue(DomainError, ValueError):
    """A value that cannot be: a price below zero, a number that is no phone number."""


class InvalidEvent(DomainError, ValueError):
    """The outbox would refuse this event; raised before anything is written."""


class UnknownEvent(DovecoteError):
    """No code here knows this event type or version: newer code wrote it. Keep it, show it."""


class NoTransaction(DovecoteError):
    """An event was emitted where no commit would write it. Emit it inside of the transaction that changes the state."""


class AbortedTransaction(DovecoteError):
    """The transaction cannot commit: a database error in it was caught. Put what may fail into a savepoint."""


class EventsNotWritten(DovecoteError):
    """A transaction was committed without events that were emitted in it. The state is there: emit them again."""


class EventsDropped(RuntimeWarning):
    """A session was closed without a commit; what was emitted in it is dropped with its transaction."""


class ConcurrentChange(DovecoteError):
    """Another transaction changed the aggregate since it was loaded. Load it again and retry."""


class MissingPackage(DovecoteError):
    """An optional package is not installed; the message names the extra that brings it."""


class WrongRequest(DovecoteError):
    """What was asked for makes no sense; asked again it makes none either. The message says what would."""

    exit_code = 2


class GatewayUnavailable(DovecoteError):
    """An external service does not answer now: try again, with growing pauses."""


class NoKeys(DovecoteError):
    """A handler wants keys in a process that was given none. Its route does not say that it needs them."""


class RedisLost(DovecoteError):
    """Redis does not know this relay: it came back empty, or as it was before."""


class NewerRelay(DovecoteError):
    """Another relay has taken over; this one must not publish any more."""


def shown(value: object, most: int = MAX_SHOWN) -> str:
    """Return a value as `repr` writes it, cut behind `most` characters and without a line break in it."""
    return cut(_shown(value, most, _MAX_DEPTH), most)


def shown_error(error: BaseException, most: int = MAX_SHOWN_ERROR) -> str:
    """Return an error's message, or its type and arguments where it has none of its own, cut behind `most` characters.

    For errors of code that we call: they may hold any value, whole.
    """
    arguments = error.args
    if len(arguments) == 1 and isinstance(arguments[0], str) and not isinstance(error, LookupError):
        return cut(_legible(arguments[0][: most + 1]), most)
    inner = ", ".join(shown(argument) for argument in arguments[:_MAX_ITEMS])
    return cut(f"{type(error).__qualname__}({inner})", most)


def cut(text: str, most: int) -> str:
    """Return the text, or its first `most` characters and three dots."""
    return text if len(text) <= most else f"{text[:most]}..."


def _legible(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]


def _shown(value: object, most: int, depth: int) -> str:
    match value:
        case None | bool():
            return repr(value)
        case str() | bytes():
            # Cut before `repr`, which may write one character as ten. A quote is missing where there is more.
            whole = repr(value[: most + 1])
            return whole if len(value) <= most else whole[:-1]
        case int():
            if value.bit_length() <= _MAX_BITS:
                return repr(int(value))
            return f"an integer of about {value.bit_length() * 30_103 // 100_000 + 1} digits"
        case float():
            return repr(value)
        case Decimal():
            return str(value)
        case Mapping():
            if not depth:
                return f"{{... {len(value)} items}}" if value else "{}"
            pairs = [
                f"{_shown(key, most, 0)}: {_shown(item, most, depth - 1)}"
                for key, item in islice(value.items(), _MAX_ITEMS)
            ]
            return "{" + ", ".join(pairs) + (", ..." if len(value) > _MAX_ITEMS else "") + "}"
        case list() | tuple():
            if not depth:
                return f"[... {len(value)} items]" if value else "[]"
            items = [_shown(item, most, depth - 1) for item in value[:_MAX_ITEMS]]
            return "[" + ", ".join(items) + (", ..." if len(value) > _MAX_ITEMS else "") + "]"
        case _:
            return _of_its_own(value)


def _of_its_own(value: object) -> str:
    # A time, a UUID, a member of an enum: `repr` of these is short. Of anything else only the type is safe to show.
    if type(value).__module__ in ("datetime", "uuid") or hasattr(type(value), "__members__"):
        return repr(value)
    return f"a {type(value).__qualname__}"
