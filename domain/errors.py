"""The small tree of errors; each branch says what the caller should do next."""


class DovecoteError(Exception):
    """Anything this package raises on purpose."""


class DomainError(DovecoteError):
    """The business said no. Asking again gives the same answer: do not retry."""


class Refused(DomainError):
    """The thing exists but is in no state for this."""


class NotFound(DomainError):
    """There is no such thing."""


class InvalidValue(DomainError, ValueError):
    """A value that cannot be: a price below zero, a number that is no phone number."""


class InvalidEvent(DomainError, ValueError):
    """The outbox would refuse this event; raised before anything is written."""


class UnknownEvent(DovecoteError):
    """No code here knows this event type or version: newer code wrote it. Keep it, show it."""


class ConcurrentChange(DovecoteError):
    """Somebody else changed the aggregate since it was loaded. Load it again and retry."""


class MissingPackage(DovecoteError):
    """An optional package is not installed; the message names the extra that brings it."""
