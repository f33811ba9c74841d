"""Dramatiq's Redis broker with what we add to it.

- An idle consumer blocks on its queue instead of polling it, so a message is taken at once.
- A batch of bundles is published by one script, each message once, only by the newest relay.
- Messages that a worker cannot finish are requeued at the head of their queue, in order.
- Messages of a paused handler are held, and return to the head of their queue, in order.
- Messages whose fetch reply was lost are found again when the consumer reconnects.
- Messages for a handler that this process does not have go to a fallback actor; Dramatiq would dead-letter them.
- Messages for our handlers that no relay of ours made are refused for good.

Dramatiq's key layout (its docs, "Enqueueing messages from other languages") is kept to the letter.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import redis
import structlog
from dramatiq.brokers.redis import RedisBroker, _scripts
from dramatiq.common import current_millis, dq_name, q_name
from dramatiq.encoder import Encoder, MessageData
from dramatiq.errors import DecodeError
from dramatiq.middleware import Middleware
from redis.exceptions import NoScriptError, OutOfMemoryError

from dovecote.broker.fetcher import Fetcher
from dovecote.broker.redis_client import connect_redis
from dovecote.broker.refusals import Refusals
from dovecote.envelope import read_message
from dovecote.envelope.message_reader import RefusedMessage
from dovecote.errors import NewerRelay, RedisLost
from dovecote.store.poison import CRASHES_EXPIRE_SECONDS
from dovecote.telemetry.instrumentation import ConsumerInstrumentation

log = structlog.get_logger()

_LUA = Path(__file__).parent / "lua"

# Messages from whose size that of a queue is estimated.
_SAMPLES = 100
# Of one call, in which Redis serves no other client for some milliseconds.
_MAX_RESUMED = 1_000
# A bundle has a megabyte of envelopes (dovecote/store/leases.py), and other programs may send larger messages.
_MAX_MESSAGE_BYTES, _MAX_FETCHED_BYTES = 16_000_000, 64_000_000
# Refused messages that are kept, so that an operator can see what they were.
_MAX_DEAD_LETTERS, _MAX_DEAD_LETTER_BYTES = 1_000, 1_100_000
_MAX_CRASHES_DIGITS = 7
# Ids of ours have 33 bytes, and those of Dramatiq 36.
_MAX_ID_BYTES = 200
_MAX_ACKS = 100_000


@dataclass(frozen=True, slots=True)
class QueuedBundle:
    """One Dramatiq message, encoded. The id follows from the content: publishing it twice adds it once."""

    handler: str
    queue: str
    id: str
    message: bytes


@dataclass(frozen=True, slots=True)
class Fetched:
    """A message as it was fetched. `data` is None where it has more bytes than any message may have."""

    id: bytes
    size: int
    data: bytes | None
    crashes: int


@dataclass(frozen=True)
class RedisUsage:
    """What Redis holds, in bytes: in total, at most (0 is unlimited), by queue, and held for each paused handler.

    under_way   whether anything is queued or in flight
    """

    used: int
    maxmemory: int
    queued: Mapping[str, int]
    held: Mapping[str, int]
    under_way: bool = False


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
        publish_bytes: int = 8_000_000,
        **options: Any,
    ) -> None:
        if client is None and url is not None:
            client = connect_redis(url, socket_timeout_seconds + poll_interval_ms / 1_000)
        super().__init__(client=client, middleware=middleware, **options)
        self.poll_interval_ms = poll_interval_ms
        self._publish_bytes = publish_bytes
        self.instrumentation = instrumentation or ConsumerInstrumentation()
        dispatch = (_LUA / "dispatch_head.lua").read_bytes() + _scripts["dispatch"]
        self.scripts["dispatch"] = self.client.register_script(dispatch)
        self._publish = self.client.register_script((_LUA / "publish.lua").read_bytes())
        self._requeue = self.client.register_script((_LUA / "requeue.lua").read_bytes())
        self._reap = self.client.register_script((_LUA / "reap.lua").read_bytes())
        self._hold = self.client.register_script((_LUA / "hold.lua").read_bytes())
        self._resume_held = self.client.register_script((_LUA / "resume_held.lua").read_bytes())
        self._fetch = self.client.register_script((_LUA / "fetch.lua").read_bytes())
        self._mend = self.client.register_script((_LUA / "mend.lua").read_bytes())
        self._refuse = self.client.register_script((_LUA / "refuse.lua").read_bytes())
        #: In which history this process publishes, and how often it has put something on a queue.
        self.history = ""
        self.sent = 0
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

    # For the relay ---------------------------------------------------------------------------

    @property
    def fence_keys(self) -> list[str]:
        """Where Redis keeps which relay may publish: its epoch, and what goes with it (dovecote/relay/fence.py)."""
        return [f"{self.namespace}:__relay__", f"{self.namespace}:__relay__.history"]

    def publish(self, epoch: int, bundles: Iterable[QueuedBundle]) -> int:
        """Put the bundles on their queues; return how many were not there yet.

        Only in the history that was claimed last, see `history`.

        One call takes at most `publish_bytes` of them, or a single larger one: Redis serves no other client meanwhile.
        After an error some may be queued; published once more, they are queued once.
        Errors: RedisLost, NewerRelay, RedisError.
        """
        added = size = 0
        self.sent += 1
        args: list[str | int | bytes] = [epoch, self.history]
        for bundle in bundles:
            if size and size + len(bundle.message) > self._publish_bytes:
                added += self._call_publish(epoch, args)
                args, size = [epoch, self.history], 0
            args += (f"{self.namespace}:{bundle.queue}", bundle.id, bundle.message)
            size += len(bundle.message)
        return added + self._call_publish(epoch, args)

    def _call_publish(self, epoch: int, args: Sequence[str | int | bytes]) -> int:
        added = int(self._publish(keys=self.fence_keys, args=args))
        if added == -1:
            raise RedisLost
        if added == -2:
            raise NewerRelay(f"a newer relay has taken over from epoch {epoch}")
        return added

    def holds_messages(self, queue: str) -> bool:
        """Return whether anything is queued there or in flight."""
        return bool(self.client.exists(f"{self.namespace}:{queue}.msgs"))

    def which_are_queued(self, queue: str, ids: Iterable[str]) -> set[str]:
        """Return those of the messages that are queued or in flight."""
        ids = list(ids)
        pipeline = self.client.pipeline(transaction=False)
        for id in ids:
            pipeline.hexists(f"{self.namespace}:{queue}.msgs", id)
        return {id for id, found in zip(ids, pipeline.execute(), strict=True) if found}

    def look(self, handlers: Sequence[tuple[str, str]]) -> tuple[str, RedisUsage]:
        """Return the run id of the Redis process and how much there is for these (queue, handler), in one round trip.

        The size of a queue is an estimate from some of its messages; what is held is a share of it by number.
        Where MEMORY USAGE is not allowed, it is 0.
        """
        names = sorted({queue for queue, _ in handlers})
        with self.client.pipeline(transaction=False) as pipeline:
            pipeline.info("server")
            pipeline.info("memory")
            for queue in names:
                pipeline.memory_usage(f"{self.namespace}:{queue}.msgs", samples=_SAMPLES)
                pipeline.hlen(f"{self.namespace}:{queue}.msgs")
            for queue, handler in handlers:
                pipeline.llen(self._held(queue, handler))
            server, memory, *counts = pipeline.execute(raise_on_error=False)
        for reply in (server, memory):
            if isinstance(reply, Exception):
                raise reply
        numbers = [0 if isinstance(reply, redis.ResponseError) else int(reply or 0) for reply in counts]
        sizes = dict(zip(names, numbers[: 2 * len(names) : 2], strict=True))
        messages = dict(zip(names, numbers[1 : 2 * len(names) : 2], strict=True))
        held_messages = numbers[2 * len(names) :]
        held = {
            (queue, handler): sizes[queue] * min(number, messages[queue]) // max(1, messages[queue])
            for (queue, handler), number in zip(handlers, held_messages, strict=True)
        }
        for (queue, _), size in held.items():
            sizes[queue] -= size
        usage = RedisUsage(
            used=int(memory["used_memory"]),
            maxmemory=int(memory.get("maxmemory", 0)),
            queued=sizes,
            held={handler: size for (_, handler), size in held.items()},
            under_way=sum(messages.values()) > sum(held_messages),
        )
        return str(server["run_id"]), usage

    def reap(self, names: Iterable[str] | None = None) -> int:
        """Requeue the messages of workers that have been silent too long; return how many.

        On these queues and delay queues, by default on all that are declared.

        Dramatiq does it with a chance of one in a thousand per fetch of that very queue.
        """
        # One round trip: a slow Redis must not keep the relay from its other work.
        with self.client.pipeline(transaction=False) as pipeline:
            for name in names or [name for queue in self.queues for name in (queue, dq_name(queue))]:
                self._reap(
                    keys=[f"{self.namespace}:{name}", f"{self.namespace}:__heartbeats__"],
                    args=[self.heartbeat_timeout, f"{self.namespace}:__acks__.", name, CRASHES_EXPIRE_SECONDS],
                    client=pipeline,
                )
                self._look_at(name, pipeline, maintain=True)
            return sum(pipeline.execute()[::2])

    def mend(self, handlers: Iterable[tuple[str, str]] = ()) -> bool:
        """Delete and log keys with a name of ours and another type than ours; return whether there was any.

        For the declared queues, and for what is held for these (queue, handler).
        """
        types = dict.fromkeys(self.fence_keys[:1], "string") | dict.fromkeys(self.fence_keys[1:], "hash")
        types[f"{self.namespace}:__heartbeats__"] = "zset"
        for name in (name for queue in self.queues for name in (queue, dq_name(queue))):
            key = f"{self.namespace}:{name}"
            types |= {key: "list", self._acks(name): "set", f"{key}.XQ": "zset"}
            types |= dict.fromkeys((f"{key}{end}" for end in (".msgs", ".XQ.msgs", ".in_flight", ".crashes")), "hash")
        types |= {self._held(queue, handler): "list" for queue, handler in handlers}
        deleted = self._mend(keys=list(types), args=list(types.values()))
        for key in deleted:
            log.error("a key in Redis was of another type than ours, and is deleted", key=ascii(key)[2:-1])
        return bool(deleted)

    def with_held(self, handlers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return those (queue, handler) for which messages are held."""
        asked = list(handlers)
        with self.client.pipeline(transaction=False) as pipeline:
            for queue, handler in asked:
                pipeline.exists(self._held(queue, handler))
            return [one for one, found in zip(asked, pipeline.execute(), strict=True) if found]

    def resume_held(self, queue: str, handler: str) -> None:
        """Return what is held for a handler to the head of its queue, in order."""
        self.sent += 1
        keys = [self._held(queue, handler), f"{self.namespace}:{queue}"]
        while self._resume_held(keys=keys, args=[_MAX_RESUMED]):
            pass

    def heartbeat(self, queue: str) -> None:
        """Record that this process is alive."""
        self._look_at(queue, self.client)

    def _look_at(self, queue: str, client: redis.Redis, *, maintain: bool = False) -> None:
        # `qsize` reads only; every dispatched command records a heartbeat first.
        self.scripts["dispatch"](
            keys=[self.namespace], args=self._arguments("qsize", queue, maintain=maintain), client=client
        )

    def _arguments(self, command: str, queue: str, *more: int, maintain: bool = False) -> list[str | int]:
        return [
            command,
            current_millis(),
            queue,
            self.broker_id,
            self.heartbeat_timeout,
            self.dead_message_ttl,
            int(maintain),
            self._max_unpack_size(),
            *more,
        ]

    # For consumers ---------------------------------------------------------------------------

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
            # In place of BLMOVE's own wait: an idle consumer must not ask a full Redis without a pause.
            time.sleep(wait_seconds)
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
