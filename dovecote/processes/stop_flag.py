"""A stop flag with a file descriptor, for use in `select`."""

import os
import select
import signal
from contextlib import suppress
from typing import Protocol


class HasFileno(Protocol):
    def fileno(self) -> int: ...


class StopFlag:
    """Like a threading.Event; signal handlers and other threads may set it, and `sleep` ends at once."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._is_set = False
        #: The signal that set it, if one did.
        self.signal: signal.Signals | None = None

    def set(self, sig: int | None = None) -> None:
        if self.signal is None and sig is not None:
            self.signal = signal.Signals(sig)
        if not self._is_set:
            self._is_set = True
            self.interrupt()  # never read: the pipe stays readable

    def is_set(self) -> bool:
        return self._is_set

    def interrupt(self) -> None:
        """End the current sleep, or the next one, without setting the flag."""
        with suppress(BlockingIOError):  # the pipe is full, so it is readable
            os.write(self._writer, b".")

    def sleep(self, seconds: float, watched: HasFileno | None = None) -> bool:
        """Sleep until the time is over, the flag is set or interrupted, or `watched` is readable.

        Return whether something ended it early.
        """
        if self._is_set:
            return True
        files = [self._reader, *([watched.fileno()] if watched else [])]
        ready = select.select(files, [], [], max(0.0, seconds))[0]
        if self._reader in ready and not self._is_set:
            with suppress(BlockingIOError):
                os.read(self._reader, 1_000)
        return bool(ready)

    def fileno(self) -> int:
        return self._reader

    def close(self) -> None:
        os.close(self._reader)
        os.close(self._writer)
