"""A bundle, and the parts that it is taken in once it has failed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from dovecote.envelope import Envelope
from dovecote.route import Route


@dataclass(frozen=True)
class Bundle:
    """Events of one message for one handler, in writing order.

    retry   the message was sent for deliveries that are due: only those still due are taken
    replay  the replay that has the handler act again on what it has acted on, once
    sent_in the run of Postgres in which the relay has read them, by dovecote.outbox_run(); None where the message does
            not say
    """

    route: Route
    envelopes: Sequence[Envelope]
    retry: bool = False
    replay: UUID | None = None
    sent_in: str | None = None

    def of(self, envelopes: Sequence[Envelope]) -> "Bundle":
        """Return the same for these of its events."""
        return replace(self, envelopes=envelopes)


class Parts:
    """Which events to take next, left to right, so that a few bad ones do not cost each other a transaction.

    Where the handler was called event by event, the one at work when it raised is blamed: those before it are taken,
    then it alone, then the rest. Otherwise the part is halved, and halved again, until the bad one is alone. What
    comes after a bad one begins with as many events as went through before it, and doubles: with many bad ones, long
    parts would be marked and rolled back again and again.
    """

    def __init__(self, envelopes: Sequence[Envelope]) -> None:
        self._left = envelopes
        self._length = self._limit = len(envelopes)
        # So many of the first are known to contain a bad one.
        self._suspects = 0
        self._since_last_bad = 0

    def next(self) -> Sequence[Envelope]:
        """Return the next part; empty when all is done."""
        return self._left[: self._length]

    def succeeded(self) -> None:
        done = len(self.next())
        self._left = self._left[done:]
        self._since_last_bad += done
        self._suspects = max(0, self._suspects - done)
        if self._suspects:
            # They failed together with those that are done now: no need to see them fail once more.
            self._length = max(1, self._suspects // 2)
        else:
            self._limit *= 2
            self._length = self._limit

    def failed(self, blamed: Envelope | None = None, *, was_slow: bool = False) -> None:
        """Take less. Blame may be wrong, when a write that was put off fails in a later call.

        `was_slow`: it was cut off, and each part that still hangs takes as long: fewer, smaller ones are tried.
        """
        part = self.next()
        assert len(part) > 1, "a single event that fails is bad"
        before = next((n for n, envelope in enumerate(part) if envelope is blamed), None)
        if before is not None:
            self._suspects, self._length = before + 1, max(1, before)
        else:
            self._suspects, self._length = len(part), max(1, len(part) // (8 if was_slow else 2))

    def was_bad(self) -> None:
        """The part was a single event, and has failed for good."""
        self._left = self._left[1:]
        self._length = self._limit = max(1, self._since_last_bad)
        self._suspects = self._since_last_bad = 0
