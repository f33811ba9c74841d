"""The parts that a bundle is taken in once it has failed."""

from collections.abc import Sequence

from dovecote.envelope import Envelope


class Parts:
    """Which events to take next, left to right, so that a few bad ones do not cost each other a transaction.

    Where the handler was called event by event, the one in flight when it raised is blamed: those before it are taken,
    then it alone, then the rest. Otherwise the part is halved, and halved again, until the bad one is alone. What
    comes after a bad one begins with as many events as succeeded before it, and doubles: with many bad ones, long
    parts would be rolled back again and again.
    """

    def __init__(self, envelopes: Sequence[Envelope]) -> None:
        self._left = envelopes
        self._length = self._limit = len(envelopes)
        # At least one of these first events is bad.
        self._with_bad_one = 0
        self._since_last_bad = 0

    def next(self) -> Sequence[Envelope]:
        """Return the next part; empty when all is done."""
        return self._left[: self._length]

    def succeeded(self) -> None:
        done = len(self.next())
        self._left = self._left[done:]
        self._since_last_bad += done
        self._with_bad_one = max(0, self._with_bad_one - done)
        if self._with_bad_one:
            # They failed together with those that are done now, and would fail together once more.
            self._length = max(1, self._with_bad_one // 2)
        else:
            self._limit *= 2
            self._length = self._limit

    def failed(self, blamed: Envelope | None = None, *, was_slow: bool = False) -> None:
        """Take fewer. Blame may be wrong: a deferred write fails in a later call.

        `was_slow`: the handler was cut off. Each part that still hangs takes as long, so smaller ones are tried.
        """
        part = self.next()
        assert len(part) > 1, "a single event that fails is bad"
        before = next((n for n, envelope in enumerate(part) if envelope is blamed), None)
        if before is not None:
            self._with_bad_one, self._length = before + 1, max(1, before)
        else:
            self._with_bad_one, self._length = len(part), max(1, len(part) // (8 if was_slow else 2))

    def was_bad(self) -> None:
        """The part was a single event, and has failed for good."""
        self._left = self._left[1:]
        self._length = self._limit = max(1, self._since_last_bad)
        self._with_bad_one = self._since_last_bad = 0
