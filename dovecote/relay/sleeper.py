"""How a relay waits: until a time has passed, something arrives on its connection, or it is told to stop."""

import os
import select
from contextlib import suppress

from dovecote.store.reader import Connection


class Sleeper:
    """Sleep that `stop` ends at once, also from a signal handler."""

    def __init__(self) -> None:
        self.stopping = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)

    def stop(self) -> None:
        self.stopping = True
        os.write(self._wake_writer, b".")

    def interrupt(self) -> None:
        """End the sleep at hand, or the next one, from another thread."""
        with suppress(BlockingIOError):  # full: it is interrupted already
            os.write(self._wake_writer, b".")

    def sleep(self, seconds: float, connection: Connection | None = None) -> bool:
        """Return whether something came before the time was over."""
        if self.stopping:
            return True
        watched = [self._wake_reader, *([connection.fileno()] if connection else [])]
        came = select.select(watched, [], [], max(0.0, seconds))[0]
        if self._wake_reader in came and not self.stopping:
            with suppress(BlockingIOError):
                os.read(self._wake_reader, 1_000)
        return bool(came)
