"""The small tree of errors; each branch says what the caller should do next."""

from datetime import UTC, datetime, timedelta
from typing import ClassVar


class DovecoteError(Exception):
    """Anything this package raises on purpose."""


class DomainError(DovecoteError):
    """The business said no. Asking again gives the same answer: do not retry."""


class Refused(DomainError):
    """The thing exists but is in no state for this."""


class RateLimited(Refused):
    """Too many of them lately. Asking earlier than told changes nothing, and makes nothing longer.

    retry_after  how long to wait, from the moment that the caller gave; more than nothing
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
    """An event was emitted where no commit would write it. Emit it inside of the transaction that it tells of."""


class AbortedTransaction(DovecoteError):
    """The transaction cannot commit: a database error in it was caught. Put what may fail into a savepoint."""


class EventsNotWritten(DovecoteError):
    """A transaction was committed without events that were emitted in it. The state is there: emit them again."""


class EventsDropped(RuntimeWarning):
    """A session was closed without a commit; what was emitted in it is dropped with its transaction."""


class ConcurrentChange(DovecoteError):
    """Somebody else changed the aggregate since it was loaded. Load it again and retry."""


class MissingPackage(DovecoteError):
    """An optional package is not installed; the message names the extra that brings it."""


class GatewayUnavailable(DovecoteError):
    """The outside world does not answer for the moment: try again, with growing pauses."""


class NoKeys(DovecoteError):
    """A handler wants keys in a process that was given none. Its route does not say that it needs them."""


class RedisLost(DovecoteError):
    """Redis does not know this relay: it came back empty, or as it was before."""


class NewerRelay(DovecoteError):
    """Another relay has taken over; this one must not publish any more."""
