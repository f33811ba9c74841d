"""Read the next batch of a backlog while the one at hand is on its way to Redis.

Postgres makes the envelopes of one batch while this process cuts and sends the one before. Only a full batch
is followed by another at once, so an event that comes alone is read when it comes and waits for nobody.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from dovecote.store.reader import Batch, Reader


class ReadAhead:
    """Hands out the reader's batches in its order; the reader belongs to it from now on.

    It shares the leader's connection, which runs one statement at a time: what else the leader asks there waits for it.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: Future[Batch] | None = None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def take(self, *, at_once: bool = False) -> Batch:
        """Return the next batch; `at_once` is for the reader. Errors: those of reading."""
        batch = self._next.result() if self._next else self._reader.read(at_once=at_once)
        self._next = self._thread.submit(self._reader.read) if batch.is_full else None
        return batch

    def settle(self) -> None:
        """Wait until nothing is being read: the connection is the caller's alone."""
        if self._next:
            wait([self._next])
