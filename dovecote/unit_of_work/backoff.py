"""How long to wait before the next try, and which tries to log."""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Exponential back-off: the pause doubles from `first_seconds` up to `max_seconds`.

    jitter     largest part of a pause that is taken off at random, 0 to 1
    log_first  the first try to log; then ten times as many tries, and every multiple of a hundred times as many
    """

    first_seconds: float
    max_seconds: float
    jitter: float = 0.0
    log_first: int = 1

    def pause_seconds(self, tries: int) -> float:
        """Return the pause after this many tries, 1 being the first."""
        return self.max_pause_seconds(tries) * random.uniform(1.0 - self.jitter, 1.0)

    def max_pause_seconds(self, tries: int) -> float:
        """Return the longest pause after this many tries, before jitter."""
        # The exponent is bounded: a float ends at 2^1024.
        return min(self.first_seconds * 2.0 ** min(tries - 1, 64), self.max_seconds)

    def should_log(self, tries: int) -> bool:
        """Return whether the failure of this try is to be logged: often at first, and seldom in a long outage."""
        return tries in (self.log_first, 10 * self.log_first) or tries % (100 * self.log_first) == 0
