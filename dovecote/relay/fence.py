"""The fencing token in Redis: which epoch and history may publish, of which run of Postgres, and the last heartbeat.

The epoch has a key of its own; the rest is a hash beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovecote.broker.publisher import Publisher
from dovecote.errors import NewerRelay, RedisLost
from dovecote.store.runs import Run

_LUA = Path(__file__).parents[1] / "broker" / "lua"

# Of an epoch, or of a time in milliseconds.
_MAX_DIGITS = 15
_DETAILS = ("history", "instance", "seen")
# Of one field; a relay writes 60 at most.
_MAX_DETAIL_BYTES = 1_000
# Of one call, which blocks Redis for a millisecond or two.
_MAX_DROPPED = 1_000
_MSGS, _HELD, _DEAD = ".msgs", ".held.", ".XQ"


def _number(text: bytes | None) -> int:
    return int(text) if text and len(text) <= _MAX_DIGITS and text.isdigit() else 0


@dataclass(frozen=True)
class Fence:
    """What Redis holds of the relay that claimed it last.

    redis_run   run id of the Redis process
    epoch       0 for none
    history     empty for none; any bytes that are there, with surrogates for what is not UTF-8
    instance    the run of Postgres it was connected to; empty for none
    silent_ms   the age of its last heartbeat, by the clock of Redis
    """

    redis_run: str
    epoch: int
    history: str
    instance: str
    silent_ms: int


@dataclass(frozen=True)
class Claim:
    """The relay that wants to publish: its epoch and history, its run of Postgres, and the heartbeat there."""

    epoch: int
    history: str
    instance: str
    heartbeat: int


class RedisFence:
    """Reads and writes the fencing token. Errors: every method may raise redis.RedisError."""

    def __init__(self, broker: Publisher) -> None:
        self._broker = broker
        self._client: Any = broker.client
        self._claim = self._client.register_script((_LUA / "claim.lua").read_bytes())
        self._heartbeat = self._client.register_script((_LUA / "heartbeat.lua").read_bytes())
        self._drop = self._client.register_script((_LUA / "drop.lua").read_bytes())

    def read(self) -> Fence:
        """Return what is there."""
        epoch_key, details_key = self._broker.fence_keys
        self._delete_long_fields(details_key)
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.info("server")
            pipeline.getrange(epoch_key, 0, _MAX_DIGITS)
            pipeline.hmget(details_key, *_DETAILS)
            pipeline.time()
            info, epoch, details, (seconds, micros) = pipeline.execute()
        history, instance, seen = ((field or b"").decode(errors="surrogateescape") for field in details)
        silent_ms = seconds * 1_000 + micros // 1_000 - _number(seen.encode(errors="surrogateescape"))
        # Any client may have written these: what is no run, epoch or time of ours counts as none.
        instance = instance if Run.read(instance) else ""
        return Fence(str(info["run_id"]), _number(epoch), history, instance, silent_ms)

    def _delete_long_fields(self, details_key: str) -> None:
        # No relay writes such a field, and those of other clients must not fill our memory.
        with self._client.pipeline(transaction=False) as pipeline:
            for name in _DETAILS:
                pipeline.hstrlen(details_key, name)
            sizes = pipeline.execute()
        too_long = [name for name, size in zip(_DETAILS, sizes, strict=True) if size > _MAX_DETAIL_BYTES]
        if too_long:
            self._client.hdel(details_key, *too_long)

    def claim(self, claim: Claim, *, over: str, known_epoch: int | None = None, lowest_heartbeat: int = 0) -> bool:
        """Let only this epoch and history publish, if Redis is in history `over`; return whether it was.

        With `known_epoch`, only if the fence also has this epoch, the claim's run of Postgres, and a heartbeat from
        `lowest_heartbeat` to the claim's.
        Errors: NewerRelay.
        """
        found_there = over.encode(errors="surrogateescape")
        args: list[str | int | bytes] = [claim.epoch, claim.history, claim.instance, claim.heartbeat, found_there]
        if known_epoch is not None:
            args += [known_epoch, lowest_heartbeat]
        found, claimed = self._claim(keys=self._broker.fence_keys, args=args)
        if found > claim.epoch:
            raise NewerRelay(f"epoch {found} has taken over from {claim.epoch}")
        if claimed:
            self._broker.history = claim.history
        return bool(claimed)

    def heartbeat(self, claim: Claim, confirmed: int) -> bool:
        """Send the claim's heartbeat; False if Redis has another epoch or history, or went back before `confirmed`."""
        args: list[str | int] = [claim.epoch, claim.history, claim.heartbeat, confirmed]
        return bool(self._heartbeat(keys=self._broker.fence_keys, args=args))

    def drop(self, claim: Claim) -> Iterator[int]:
        """Drop our messages from every queue, held ones included; yield how many, call by call.

        Messages in flight stay with their workers, dead letters stay, and messages of others keep their order.
        Errors: RedisLost when another relay has claimed Redis meanwhile.
        """
        for list_, queue in self._lists():
            others = dropped = 0
            while True:
                keys = [list_, queue, *self._broker.fence_keys]
                looked_at, kept = self._drop(keys=keys, args=[claim.epoch, claim.history, others, _MAX_DROPPED])
                if looked_at < 0:
                    raise RedisLost
                yield looked_at - kept
                others, dropped = others + kept, dropped + looked_at - kept
                if not looked_at:
                    if not (others and dropped):
                        break
                    # Once more: while others' messages are taken from the head, ours move up past our position.
                    others = dropped = 0

    def _lists(self) -> list[tuple[str, str]]:
        """Return every list of messages with the queue it belongs to, also of queues that no route names any more."""
        prefix = f"{self._broker.namespace}:"
        hashes = self._names(f"{prefix}*{_MSGS}")
        queues = [name.removesuffix(_MSGS) for name in hashes if not name.endswith(_DEAD + _MSGS)]
        held = [(name, name.partition(_HELD)[0]) for name in self._names(f"{prefix}*{_HELD}*")]
        # A queue has no colon in its name: what has one is of a namespace that begins as ours does.
        return [
            (prefix + name, prefix + queue)
            for name, queue in [*((queue, queue) for queue in queues), *held]
            if ":" not in queue
        ]

    def _names(self, pattern: str) -> list[str]:
        prefix = len(self._broker.namespace) + 1
        return sorted({key.decode(errors="replace")[prefix:] for key in self._client.scan_iter(pattern, count=1_000)})
