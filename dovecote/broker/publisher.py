"""What a relay does with the queues in Redis: publish, reap, resume, look. It needs no Dramatiq broker.

A batch of bundles is published by one script, each message once, and only by the newest relay. Dramatiq's key layout
(its docs, "Enqueueing messages from other languages") is kept to the letter.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import redis
import structlog
from dramatiq.brokers.redis import DEFAULT_DEAD_MESSAGE_TTL, DEFAULT_LUA_MAX_STACK, _scripts
from dramatiq.common import current_millis, dq_name

from dovecote.errors import NewerRelay, RedisLost
from dovecote.store.poison import CRASHES_EXPIRE_SECONDS

log = structlog.get_logger()

_LUA = Path(__file__).parent / "lua"

#: Dramatiq's script, with a head of ours.
DISPATCH: bytes = (_LUA / "dispatch_head.lua").read_bytes() + _scripts["dispatch"]

# Messages from whose size that of a queue is estimated.
_SAMPLES = 100
# Of one call, in which Redis serves no other client for some milliseconds.
_MAX_RESUMED = 1_000
# Half of Lua's stack, as Dramatiq's broker has it: its script unpacks so many message ids at once.
_MAX_UNPACKED = (DEFAULT_LUA_MAX_STACK or 8_000) // 2


@dataclass(frozen=True, slots=True)
class QueuedBundle:
    """One Dramatiq message, encoded. The id follows from the content: publishing it twice adds it once."""

    handler: str
    queue: str
    id: str
    message: bytes


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


class Publisher:
    """The queues of one namespace, as a relay sees them."""

    def __init__(
        self,
        client: redis.Redis,
        namespace: str,
        queues: Collection[str] = (),
        *,
        heartbeat_timeout_ms: int = 60_000,
        publish_bytes: int = 8_000_000,
    ) -> None:
        self.client = client
        self.namespace = namespace
        self.queues = queues
        self.heartbeat_timeout = heartbeat_timeout_ms
        self._publish_bytes = publish_bytes
        self._id = str(uuid4())
        self._dispatch = client.register_script(DISPATCH)
        self._publish = client.register_script((_LUA / "publish.lua").read_bytes())
        self._reap = client.register_script((_LUA / "reap.lua").read_bytes())
        self._resume_held = client.register_script((_LUA / "resume_held.lua").read_bytes())
        self._mend = client.register_script((_LUA / "mend.lua").read_bytes())
        #: In which history this process publishes, and how often it has put something on a queue.
        self.history = ""
        self.sent = 0

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

        On these queues and delay queues, by default on all of `queues`.

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
                # Dramatiq's own maintenance of the queue. `qsize` reads only.
                self._dispatch(keys=[self.namespace], args=self._maintenance_of(name), client=pipeline)
            return sum(pipeline.execute()[::2])

    def mend(self, handlers: Iterable[tuple[str, str]] = ()) -> bool:
        """Delete and log keys with a name of ours and another type than ours; return whether there was any.

        For `queues`, and for what is held for these (queue, handler).
        """
        types = dict.fromkeys(self.fence_keys[:1], "string") | dict.fromkeys(self.fence_keys[1:], "hash")
        types[f"{self.namespace}:__heartbeats__"] = "zset"
        for name in (name for queue in self.queues for name in (queue, dq_name(queue))):
            key = f"{self.namespace}:{name}"
            types |= {key: "list", f"{key}.XQ": "zset"}
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

    def _maintenance_of(self, queue: str) -> list[str | int]:
        maintain = 1
        return [
            "qsize",
            current_millis(),
            queue,
            self._id,
            self.heartbeat_timeout,
            DEFAULT_DEAD_MESSAGE_TTL,
            maintain,
            _MAX_UNPACKED,
        ]

    def _held(self, queue: str, handler: str) -> str:
        return f"{self.namespace}:{queue}.held.{handler}"
