"""Dramatiq's Redis broker with what we add to it, for the processes of consumers.

- An idle consumer blocks on its queue instead of polling it, so a message is fetched at once.
- Messages that a worker cannot finish are requeued at the head of their queue, in order.
- Messages of a paused handler are held, and return to the head of their queue, in order.
- Messages whose fetch reply was lost are found again when the consumer reconnects.
- Messages for a handler that this process does not have go to a fallback actor; Dramatiq would dead-letter them.
- Messages for our handlers that no relay of ours made are refused for good.

Dramatiq's key layout (its docs, "Enqueueing messages from other languages") is kept to the letter.
"""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.common import current_millis, q_name
from dramatiq.encoder import Encoder, MessageData
from dramatiq.errors import DecodeError
from dramatiq.middleware import Middleware
from redis.exceptions import NoScriptError, OutOfMemoryError

from dovecote.broker.fetcher import Fetcher
from dovecote.broker.publisher import DISPATCH
from dovecote.broker.redis_client import connect_redis
from dovecote.broker.refusals import Refusals
from dovecote.envelope import read_message
from dovecote.envelope.message_reader import RefusedMessage
from dovecote.telemetry.instrumentation import ConsumerInstrumentation

_LUA = Path(__file__).parent / "lua"

# A bundle has a megabyte of envelopes (dovecote/store/leases.py), and other programs may send larger messages.
_MAX_MESSAGE_BYTES, _MAX_FETCHED_BYTES = 16_000_000, 64_000_000
# Refused messages that are kept, so that an operator can see what they were.
_MAX_DEAD_LETTERS, _MAX_DEAD_LETTER_BYTES = 1_000, 1_100_000
_MAX_CRASHES_DIGITS = 7
# Ids of ours have 33 bytes, and those of Dramatiq 36.
_MAX_ID_BYTES = 200
_MAX_ACKS = 100_000


@dataclass(frozen=True, slots=True)
class Fetched:
    """A message as it was fetched. `data` is None where it has more bytes than any message may have."""

    id: bytes
    size: int
    data: bytes | None
    crashes: int


class OutboxBroker(RedisBroker):
    """RedisBroker for bundles of events.

    A process holds one connection for each queue and delay queue it consumes, while it waits, and at
    most one for each worker thread, while it acknowledges.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        client: redis.Redis | None = None,
        poll_interval_ms: int = 1_000,
        socket_timeout_seconds: float = 5.0,
        middleware: list[Middleware] | None = None,
        instrumentation: ConsumerInstrumentation | None = None,
        **options: Any,
    ) -> None:
        if client is None and url is not None:
            client = connect_redis(url, socket_timeout_seconds + poll_interval_ms / 1_000)
        super().__init__(client=client, middleware=middleware, **options)
        self.poll_interval_ms = poll_interval_ms
        self.instrumentation = instrumentation or ConsumerInstrumentation()
        self.scripts["dispatch"] = self.client.register_script(DISPATCH)
        self._requeue = self.client.register_script((_LUA / "requeue.lua").read_bytes())
        self._hold = self.client.register_script((_LUA / "hold.lua").read_bytes())
        self._fetch = self.client.register_script((_LUA / "fetch.lua").read_bytes())
        self._refuse = self.client.register_script((_LUA / "refuse.lua").read_bytes())
        #: What this process has fetched from each queue and not finished, in that order.
        self._in_hand: dict[str, dict[str, None]] = {}
        self._in_hand_lock = threading.Lock()
        self.stopping = False
        #: Handlers whose messages a relay signs, and by queue the actor for the messages of all other handlers.
        self.signed_handlers: set[str] = set()
        self.fallback_actors: dict[str, str] = {}
        self._refusals = Refusals()

    @property
    def consumer_class(self) -> type[Fetcher]:
        return Fetcher

    def heartbeat(self, queue: str) -> None:
        """Record that this process is alive."""
        # `qsize` reads only; every dispatched command records a heartbeat first.
        self.scripts["dispatch"](
            keys=[self.namespace],
            args=[
                "qsize",
                current_millis(),
                queue,
                self.broker_id,
                self.heartbeat_timeout,
                self.dead_message_ttl,
                0,
                self._max_unpack_size(),
            ],
        )

    def await_and_fetch(self, queue: str, most: int, wait_seconds: float) -> list["Fetched"]:
        """Wait until something is queued and fetch it, in one round trip; return nothing when nothing came.

        BLMOVE from a list to itself moves nothing: it waits, and Redis runs the fetch behind it when it has ended.
        """
        source = f"{self.namespace}:{queue}"
        keys = [source, f"{source}.msgs", self._acks(queue), f"{self.namespace}:__heartbeats__", f"{source}.crashes"]
        arguments: list[str | int] = [self.broker_id, most, _MAX_MESSAGE_BYTES, _MAX_FETCHED_BYTES, _MAX_ID_BYTES]
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("BLMOVE", source, source, "LEFT", "LEFT", wait_seconds)
            # By its digest: whether Redis has a script, a pipeline would ask with a round trip of its own.
            pipeline.evalsha(self._fetch.sha, len(keys), *keys, *arguments)
            waited, fetched = pipeline.execute(raise_on_error=False)
        if isinstance(fetched, NoScriptError):
            fetched = self._fetch(keys=keys, args=arguments)
        is_full = isinstance(waited, OutOfMemoryError)  # it refuses BLMOVE, though that moves nothing
        for reply in (fetched,) if is_full else (waited, fetched):
            if isinstance(reply, Exception):
                raise reply
        if is_full and not fetched:
            time.sleep(wait_seconds)  # for BLMOVE, which a full Redis refuses: an idle consumer asks with a pause
        fields = iter(fetched)
        return [
            Fetched(id, size, data, _crashes(crashes))
            for id, size, data, crashes in zip(fields, fields, fields, fields, strict=True)
        ]

    def actor_for(self, queue: str, handler: str) -> str | None:
        """Return the actor that opens the bundles for this handler on this queue; None where no relay sends to it."""
        return handler if handler in self.signed_handlers else self.fallback_actors.get(queue)

    def is_signed_for(self, queue: str, actor: str) -> bool:
        """Return whether what is on this queue for this actor is of a relay, or is to be refused."""
        if queue not in self.fallback_actors:
            return actor in self.signed_handlers
        others = self.actors.keys() - self.signed_handlers - set(self.fallback_actors.values())
        return actor not in others

    def refuse(self, queue: str, id: bytes, refused: RefusedMessage) -> None:
        """Take a message off its queue for good; it is kept among the dead letters there while these are few."""
        self._refusals.log(queue, id, refused)
        self.instrumentation.refused(q_name(queue), refused.reason)
        keys = [self._acks(queue), f"{self.namespace}:{queue}", f"{self.namespace}:{q_name(queue)}.XQ"]
        self._refuse(keys=keys, args=[_MAX_DEAD_LETTERS, _MAX_DEAD_LETTER_BYTES, id])

    def requeue(self, queue: str, ids: Iterable[str]) -> None:
        """Return messages to the head of their queue, in the order they were fetched."""
        if ids := self._as_fetched(queue, ids):
            self._requeue(keys=[self._acks(queue), f"{self.namespace}:{queue}"], args=ids)
            self.release(queue, ids)

    def hold(self, queue: str, handler: str, ids: Iterable[str]) -> None:
        """Hold messages until the handler is resumed."""
        self._hold(keys=[self._acks(queue), self._held(queue, handler)], args=self._as_fetched(queue, ids))

    def reclaim(self, queue: str) -> None:
        """Requeue what Redis has as ours and we do not have: the reply to a fetch was lost."""
        # A set has no order, and ids are UUIDs or digests: any order will do.
        self.requeue(queue, sorted(self._in_redis_but_not_in_hand(queue)))

    def _in_redis_but_not_in_hand(self, queue: str) -> set[str]:
        # Some of a large set: a worker has no thousand messages.
        some: Any = self.client.srandmember(self._acks(queue), _MAX_ACKS)
        in_redis = {str(id, "ascii", "replace") for id in some}
        with self._in_hand_lock:
            return in_redis - self._in_hand.get(queue, {}).keys()

    def take(self, queue: str, ids: Iterable[str]) -> None:
        with self._in_hand_lock:
            self._in_hand.setdefault(queue, {}).update(dict.fromkeys(ids))

    def release(self, queue: str, ids: Iterable[str]) -> None:
        with self._in_hand_lock:
            in_hand = self._in_hand.get(queue, {})
            for id in ids:
                in_hand.pop(id, None)

    def in_hand(self, queue: str) -> list[str]:
        with self._in_hand_lock:
            return list(self._in_hand.get(queue, {}))

    def _as_fetched(self, queue: str, ids: Iterable[str]) -> list[str]:
        wanted = dict.fromkeys(ids)
        with self._in_hand_lock:
            ours = [id for id in self._in_hand.get(queue, {}) if id in wanted]
        return [*ours, *(id for id in wanted if id not in set(ours))]

    def _held(self, queue: str, handler: str) -> str:
        return f"{self.namespace}:{queue}.held.{handler}"

    def _acks(self, queue: str) -> str:
        return f"{self.namespace}:__acks__.{self.broker_id}.{queue}"


def _crashes(found: bytes | None) -> int:
    """Return the number of crashes in Redis. What cannot be such a number counts as one crash, to be careful."""
    if found is None:
        return 0
    return int(found) if len(found) <= _MAX_CRASHES_DIGITS and found.isdigit() else 1


class OrjsonEncoder(Encoder):
    """Dramatiq's JSON, written by orjson and read by `read_message`."""

    def encode(self, data: MessageData) -> bytes:
        return orjson.dumps(data)

    def decode(self, data: bytes) -> MessageData:
        try:
            decoded: MessageData = read_message(data)
        except ValueError as error:
            raise DecodeError(f"not a message: {data[:200]!r}", data, error) from None
        return decoded
