"""Finds out which events are queued or in flight in Redis, from the messages themselves.

An event is queued when a message that a worker will get contains it: one on the queue's list, or one held by a worker
that is alive or will be found dead. Message ids are not enough: an event may be in a message with another id, because
it was sent again, or cut when bundles had another size. Nor is the hash of messages: a message in no list is never
fetched.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from dovecote.broker.publisher import Publisher
from dovecote.envelope import handler_named_in
from dovecote.envelope.signatures import MessageKey, key_id_of
from dovecote.envelope.wire import event_ids_of_first_delivery

# Of one call: ids, sizes, and bytes of messages, unless a single one is larger.
_IDS, _SIZES, _BYTES = 5_000, 500, 4_000_000
# Bytes of one search. In a longer queue an event that was not found may be further on.
_MAX_READ_BYTES = 64_000_000
_REQUEUE = (Path(__file__).parents[1] / "broker" / "lua" / "restore.lua").read_bytes()


class _TooMuch(Exception):
    """The queue is longer than one search reads."""


class QueueSearch:
    """Searches the queues of one broker.

    Errors: redis.exceptions.RedisError, in all methods.
    """

    def __init__(self, broker: Publisher) -> None:
        #: The keys of messages that a consumer accepts; others are ignored.
        self.keys: Mapping[bytes, MessageKey] = {}
        self._client: Any = broker.client
        self._namespace = broker.namespace
        self._requeue = broker.client.register_script(_REQUEUE)
        self._room = 0
        #: Whether the last search gave up, because the queue is too long.
        self.gave_up = False

    def not_queued(self, queue: str, handler: str, events: Collection[UUID]) -> set[UUID]:
        """Return those of the events that are in no message for this handler that a worker will get.

        None while messages are held for the handler, which are about to come back, nor in a queue that is too long for
        one search: what is lost there is found when it has become shorter.
        """
        left = {str(event).encode() for event in events}
        self._room, self.gave_up = _MAX_READ_BYTES, False
        try:
            if self._is_near(queue, handler, left):
                # Towards the head, where workers fetch: that does not move what is still to be read.
                stop = -1
                while left and (ids := self._client.lrange(self._key(queue), stop - _IDS + 1, stop)):
                    left -= self._events_in(queue, handler, reversed(ids), left)
                    stop -= _IDS
                # Fetched, or fetched and requeued, since the first look.
                self._is_near(queue, handler, left)
        except _TooMuch:
            self.gave_up = True
            return set()
        return {UUID(event.decode()) for event in left}

    def requeue(self, epoch: int, queue: str, handler: str, id: str) -> bool:
        """Put a message back on its queue if it is in no list and not in flight; return whether it was."""
        keys = [f"{self._namespace}:__relay__", self._key(queue), self._heartbeats, self._held(queue, handler)]
        return bool(self._requeue(keys=keys, args=[epoch, id, f"{self._namespace}:__acks__.", queue, _IDS]))

    def _is_near(self, queue: str, handler: str, left: set[bytes]) -> bool:
        """Remove from `left` what is in flight or at the head of the queue; return whether more is behind."""
        workers = [worker.decode(errors="replace") for worker in self._client.zrange(self._heartbeats, 0, -1)]
        # In one transaction: a message that moves from one place to another is seen in one of them.
        with self._client.pipeline(transaction=True) as pipeline:
            for worker in workers:
                pipeline.srandmember(f"{self._namespace}:__acks__.{worker}.{queue}", _IDS)
            pipeline.lrange(self._key(queue), 0, _IDS - 1)
            pipeline.llen(self._key(queue))
            pipeline.exists(self._held(queue, handler))
            *acks, head, length, is_held = pipeline.execute(raise_on_error=False)
        for reply in (head, length, is_held):
            if isinstance(reply, Exception):
                raise reply
        # Workers of ours hold sets only.
        acks = [ids for ids in acks if not isinstance(ids, Exception)]
        if is_held:
            left.clear()
        for ids in (*acks, head):
            left -= self._events_in(queue, handler, ids, left)
        return bool(left) and length > len(head)

    def _events_in(self, queue: str, handler: str, ids: Iterable[bytes], wanted: set[bytes]) -> set[bytes]:
        found: set[bytes] = set()
        for message in self._messages(queue, ids):
            if wanted <= found:
                break
            if handler_named_in(message) != handler:
                continue
            events = event_ids_of_first_delivery(message)
            if events and self._is_signed(message):
                found.update(events)
        return found & wanted

    def _is_signed(self, message: bytes) -> bool:
        key = self.keys.get(key_id_of(message) or b"")
        return key is not None and key.has_signed(message)

    def _messages(self, queue: str, ids: Iterable[bytes]) -> Iterator[bytes]:
        key, asked = f"{self._key(queue)}.msgs", list(ids)
        for start in range(0, len(asked), _SIZES):
            part = asked[start : start + _SIZES]
            with self._client.pipeline(transaction=False) as pipeline:
                for id in part:
                    pipeline.hstrlen(key, id)
                sizes = pipeline.execute()
            fetched: list[bytes] = []
            room = _BYTES
            self._room -= sum(sizes)
            if self._room < 0:
                raise _TooMuch
            for id, size in zip(part, sizes, strict=True):
                if fetched and size > room:
                    yield from filter(None, self._client.hmget(key, fetched))
                    fetched, room = [], _BYTES
                fetched.append(id)
                room -= size
            yield from filter(None, self._client.hmget(key, fetched))

    @property
    def _heartbeats(self) -> str:
        return f"{self._namespace}:__heartbeats__"

    def _key(self, queue: str) -> str:
        return f"{self._namespace}:{queue}"

    def _held(self, queue: str, handler: str) -> str:
        return f"{self._namespace}:{queue}.held.{handler}"
