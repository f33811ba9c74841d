"""Which event kills the process that acts on it.

A process that dies tells nobody why. The relay's reaper counts the crash beside each message that was in its
hands (lua/reap.lua); a message with crashes is a suspect. Its events are taken one at a time, one suspect at
a time in the whole process, with a mark in Redis before each: if the process dies again, the mark names the
one that was at work. A message that was never in a crash pays nothing for this.

The count is Redis's own, and whoever can write there can make one up: then a message is taken with care, no more. What
gives an event up is a mark, and a mark counts only if a consumer has signed it for this very message.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import orjson
import redis

from dovecote.envelope.signatures import MessageKeys, split_mark

#: An event that was at work in so many processes when they died is not started again.
MAX_STARTS = 3

# One event at a time in this process: neither another suspect in the next thread nor its own bundle-mates
# are to be marked when it dies.
_one_at_a_time = threading.Lock()

# A mark goes with its message. Should the message get lost, it goes by itself.
MARK_SECONDS = 7 * 24 * 3_600
# A bundle's events have 40 bytes each.
_MAX_MARK_BYTES = 10_000_000


@dataclass
class Marks:
    """`starts` without an end, by event, and how many crashes the buried events explain."""

    starts: dict[str, int] = field(default_factory=dict)
    explained: int = 0


class Suspect:
    """One message that was in the hands of `crashes` processes when they died.

    Errors: every method may raise redis.RedisError, and those of MessageKeys.
    """

    def __init__(self, client: redis.Redis, keys: MessageKeys, queue: str, message_id: str, crashes: int) -> None:
        """`queue` with its namespace."""
        self.crashes = crashes
        self._client = client
        self._keys = keys
        self._key, self._crashes_key = f"{queue}.in_flight", f"{queue}.crashes"
        self._message_id = message_id

    def starts(self, event_id: UUID) -> int:
        """Return in how many processes the event was at work when they died.

        The crash that made the message a suspect had no mark: it counts against the first event that dies again.
        """
        marks = self._marks()
        known = marks.starts.get(str(event_id), 0)
        unexplained = self.crashes - marks.explained > known
        return known + 1 if known and unexplained else known

    def in_flight(self, event_id: UUID) -> tuple[Marks, Marks]:
        """Return what to write before the event starts, and what once it has ended, however, short of death."""
        marks = self._marks()
        others = {id: starts for id, starts in marks.starts.items() if id != str(event_id)}
        starts = marks.starts.get(str(event_id), 0) + 1
        return Marks({**others, str(event_id): starts}, marks.explained), Marks(others, marks.explained)

    def explained(self) -> None:
        """The killer is found: what happened so far speaks against no other event."""
        self.write(Marks(explained=self.crashes))

    def cleared(self) -> None:
        """The message is done with."""
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hdel(self._key, self._message_id)
            pipeline.hdel(self._crashes_key, self._message_id)
            pipeline.execute()

    def write(self, marks: Marks) -> None:
        """Nothing is incremented: after a lost reply it is written again."""
        signed = self._keys.newest().sign_mark(self._message_id, orjson.dumps(marks))
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hset(self._key, self._message_id, signed)
            pipeline.expire(self._key, MARK_SECONDS)
            pipeline.execute()

    def _marks(self) -> Marks:
        if self._client.hstrlen(self._key, self._message_id) > _MAX_MARK_BYTES:  # nobody here has written that
            return Marks()
        found = self._client.hget(self._key, self._message_id)
        mark = self._signed(found) if isinstance(found, bytes) else None
        return Marks(**orjson.loads(mark)) if mark is not None else Marks()

    def _signed(self, found: bytes) -> bytes | None:
        """Return the mark, if a consumer has signed it for this message. Nothing of any other is looked at."""
        parts = split_mark(found)
        if parts is None:
            return None
        mark, key_id, digest = parts
        key = self._keys.find(key_id)
        return mark if key is not None and key.has_signed_mark(self._message_id, mark, digest) else None


@contextmanager
def one_at_a_time(give_up: Callable[[], None]) -> Iterator[None]:
    """Hold off every other suspect of this process. `give_up` is called while waiting, and may raise."""
    while not _one_at_a_time.acquire(timeout=0.2):
        give_up()
    try:
        yield
    finally:
        _one_at_a_time.release()
