"""How a relay waits: until a time has passed, something arrives on its connection, or it is told to stop."""

import os
import select

from workers.relay.reading import Connection


class Sleeper:
    """Sleep that `stop` ends at once, also from a signal handler."""

    def __init__(self) -> None:
        self.stopping = False
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)

    def stop(self) -> None:
        self.stopping = True
        os.write(self._wake_writer, b".")

    def sleep(self, seconds: float, connection: Connection | None = None) -> bool:
        """Return whether something came before the time was over."""
        if self.stopping:
            return True
        watched = [self._wake_reader, *([connection.fileno()] if connection else [])]
        return bool(select.select(watched, [], [], max(0.0, seconds))[0])
