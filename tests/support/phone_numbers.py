"""Phone numbers for tests: as many as they want, since what one number may have is limited."""

from itertools import count

_SUBSCRIBERS = count(10_000_000)


def a_mobile() -> str:
    """Return a number that no other test of this run has, as E.164. Nothing is ever sent to it."""
    return f"+49151{next(_SUBSCRIBERS)}"
