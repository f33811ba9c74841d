"""Poison messages: which event kills the process that handles it.

A process that dies reports nothing. The relay's reaper counts the crash beside each message that was in flight in it
(dovecote/broker/lua/reap.lua). The events of a message with crashes are handled one at a time, and one such message at
a time in the whole process. Before each event its crash count in Redis is raised, and lowered once the event has ended:
if the process dies in between, the count is what is left of it. An event whose count has reached MAX_CRASHES is
dead-lettered. A message that was never in a crash pays nothing for this.

The number of crashes is Redis's own. Anybody who can write there can make one up, and has a message handled with care,
no more. What dead-letters an event is its crash count, which is valid only if a consumer has signed it for this very
message.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import orjson
import redis

from dovecote.envelope.signatures import MessageKeys, split_crash_counts

#: An event that was in flight in so many processes when they died is not handled again.
MAX_CRASHES = 3

# One event at a time in this process: when it dies, no event of another message is to have its count raised.
_one_at_a_time = threading.Lock()

#: Counts go with their message. Should the message get lost, they expire by themselves.
CRASHES_EXPIRE_SECONDS = 7 * 24 * 3_600
# A bundle's events have 40 bytes each.
_MAX_COUNTS_BYTES = 10_000_000


@dataclass
class CrashCounts:
    """`by_event`: how often each event began to be handled and did not end.

    `explained`: how many of the message's crashes are put down to events that were dead-lettered.
    """

    by_event: dict[str, int] = field(default_factory=dict)
    explained: int = 0


class PoisonMessage:
    """A message that was in flight in `crashes` processes when they died, and may be poison.

    Errors: every method may raise redis.RedisError, and those of MessageKeys.
    """

    def __init__(self, client: redis.Redis, keys: MessageKeys, queue: str, message_id: str, crashes: int) -> None:
        """`queue` with its namespace."""
        self.crashes = crashes
        self._client = client
        self._keys = keys
        self._key, self._crashes_key = f"{queue}.in_flight", f"{queue}.crashes"
        self._message_id = message_id

    def crash_count(self, event_id: UUID) -> int:
        """Return in how many processes the event was in flight when they died.

        In the first crash of a message nothing was counted yet: it counts against the first event that dies again.
        """
        counts = self._counts()
        known = counts.by_event.get(str(event_id), 0)
        unexplained = self.crashes - counts.explained > known
        return known + 1 if known and unexplained else known

    def in_flight(self, event_id: UUID) -> tuple[CrashCounts, CrashCounts]:
        """Return the counts to write before the event is handled, and those to write once that has ended."""
        counts = self._counts()
        others = {id: count for id, count in counts.by_event.items() if id != str(event_id)}
        count = counts.by_event.get(str(event_id), 0) + 1
        return CrashCounts({**others, str(event_id): count}, counts.explained), CrashCounts(others, counts.explained)

    def write(self, counts: CrashCounts) -> None:
        """Write the counts. Nothing is incremented: after a lost reply the same is written again."""
        signed = self._keys.newest().sign_crash_counts(self._message_id, orjson.dumps(counts))
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hset(self._key, self._message_id, signed)
            pipeline.expire(self._key, CRASHES_EXPIRE_SECONDS)
            pipeline.execute()

    def dead_lettered(self) -> None:
        """Put all crashes so far down to an event that is dead-lettered: they count against no other."""
        self.write(CrashCounts(explained=self.crashes))

    def clear(self) -> None:
        """Delete crashes and counts: the message is done."""
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hdel(self._key, self._message_id)
            pipeline.hdel(self._crashes_key, self._message_id)
            pipeline.execute()

    def _counts(self) -> CrashCounts:
        if self._client.hstrlen(self._key, self._message_id) > _MAX_COUNTS_BYTES:  # no consumer has written that
            return CrashCounts()
        found = self._client.hget(self._key, self._message_id)
        counts = self._signed(found) if isinstance(found, bytes) else None
        return CrashCounts(**orjson.loads(counts)) if counts is not None else CrashCounts()

    def _signed(self, found: bytes) -> bytes | None:
        """Return the counts if a consumer has signed them for this message. Nothing else is parsed."""
        parts = split_crash_counts(found)
        if parts is None:
            return None
        counts, key_id, digest = parts
        key = self._keys.find(key_id)
        return counts if key is not None and key.has_signed_crash_counts(self._message_id, counts, digest) else None


@contextmanager
def one_at_a_time(give_up: Callable[[], None]) -> Iterator[None]:
    """Hold off the events of every other poison message in this process.

    `give_up` is called now and then while waiting, and may raise.
    """
    while not _one_at_a_time.acquire(timeout=0.2):
        give_up()
    try:
        yield
    finally:
        _one_at_a_time.release()
