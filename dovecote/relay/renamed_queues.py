"""Messages on queues that were renamed: since a deploy the route of their handler names another queue.

The relay moves them to the new queue, so that a rename loses nothing. Code from before the deploy may serve the old
queue meanwhile: ids stay the same, and a message in flight stays there. Messages of handlers that no route has, and
those of other programs, are not touched; `dovecote doctor` shows them.
"""

import random
import time
from collections.abc import Generator, Hashable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from dramatiq.common import dq_name
from redis.exceptions import ResponseError

from dovecote.broker.publisher import Publisher
from dovecote.broker.redis_client import is_wrong_type
from dovecote.errors import NewerRelay, RedisLost
from dovecote.route import Route, queues

log = structlog.get_logger()

_MOVE = (Path(__file__).parents[1] / "broker" / "lua" / "move.lua").read_bytes()

_POLL_INTERVAL_SECONDS = 60.0
# While workers of older code have messages of an old queue in flight, and after something was moved.
_BUSY_POLL_INTERVAL_SECONDS = 5.0
# Duration of one step, except for its last call: the other work of the relay waits.
_STEP_SECONDS = 0.02
# Of one call, which blocks Redis for some milliseconds.
_MAX_MESSAGES = 1_000
_MAX_BYTES = 8_000_000
_KEYS_OF_A_PAGE = 1_000
# Of one search. Any client may have made up names: each search takes other ones, and ends.
_MAX_NAMES, _MAX_NAME_LENGTH = 1_000, 500
# Of one call, each of which asks about several keys.
_REAPED_QUEUES = 20

_ACKS = "__acks__."
_HELD = ".held."
_MESSAGES = ".msgs"

Name = TypeVar("Name", bound=Hashable)


@dataclass
class _There:
    """What Redis has: queues, those with messages in flight, and lists of held messages."""

    known: Set[str]
    queues: set[str] = field(default_factory=set)
    acks: set[str] = field(default_factory=set)
    held: set[tuple[str, str]] = field(default_factory=set)
    seen: int = 0

    def add(self, name: str) -> None:
        if len(name) > _MAX_NAME_LENGTH:
            return
        if name.startswith(_ACKS):
            self._add(self.acks, name.removeprefix(_ACKS).partition(".")[2])
        elif _HELD in name:
            queue, _, handler = name.partition(_HELD)
            self._add(self.held, (queue, handler))
        elif name.endswith(_MESSAGES) and not name.endswith(f".XQ{_MESSAGES}"):
            self._add(self.queues, name.removesuffix(_MESSAGES))

    def _add(self, names: set[Name], name: Name) -> None:
        """Keep a name: always a known one, the others with equal probability if they are too many."""
        if name in self.known:
            names.add(name)
            return
        self.seen += 1
        if len(names) < _MAX_NAMES + len(self.known):
            names.add(name)
        elif random.random() * self.seen < _MAX_NAMES:
            names.discard(next(one for one in names if one not in self.known))
            names.add(name)


class RenamedQueues:
    """Searches for such messages at the start of a leadership and now and then, some milliseconds at a time."""

    def __init__(self, broker: Publisher, routes: Sequence[Route], epoch: int) -> None:
        self._broker = broker
        self._client: Any = broker.client
        self._move = broker.client.register_script(_MOVE)
        self._epoch = epoch
        self._queue_of = {route.handler: route.queue for route in routes}
        self._known = {name for queue in queues(routes) for name in (queue, dq_name(queue))}
        #: When to look again.
        self.next_look = 0.0
        self._work: Iterator[None] | None = None
        self._is_first = True
        # Lists from which nothing could be moved: their length and both ends.
        self._left_alone: dict[str, tuple[object, ...]] = {}

    def step(self) -> None:
        """Continue the current search, or begin one when it is time.

        Errors: RedisLost, NewerRelay, RedisError; the next step begins a new search.
        """
        work, self._work = self._work, None
        if work is None:
            if time.monotonic() < self.next_look:
                return
            work = self._look()
        until = time.monotonic() + _STEP_SECONDS
        for _ in work:
            if time.monotonic() >= until:
                self._work = work
                return

    def _look(self) -> Iterator[None]:
        there = _There(self._known)
        cursor = -1
        while cursor:
            cursor, keys = self._client.scan(max(0, cursor), match=f"{self._broker.namespace}:*", count=_KEYS_OF_A_PAGE)
            for key in keys:
                there.add(key.decode("utf-8", "replace").partition(":")[2])
            yield
        unknown = there.acks - self._known
        names = sorted(unknown)
        for start in range(0, len(names), _REAPED_QUEUES):
            try:
                self._broker.reap(names[start : start + _REAPED_QUEUES])
            except ResponseError as error:
                if not is_wrong_type(error):  # not queues
                    raise
            yield
        moved = 0
        # Current queues once: only a deploy leaves messages of moved handlers on one.
        for queue in sorted(there.queues if self._is_first else there.queues - self._known):
            moved += yield from self._move_from(queue)
        for queue, handler in sorted(there.held):
            if self._queue_of.get(handler, queue) != queue:
                moved += yield from self._move_from(queue, handler)
        self._is_first = False
        self.next_look = time.monotonic() + (
            _BUSY_POLL_INTERVAL_SECONDS if moved or unknown else _POLL_INTERVAL_SECONDS
        )

    def _move_from(self, queue: str, handler: str | None = None) -> Generator[None, None, int]:
        """Move what lies there, one call a step; return how many messages."""
        prefix = f"{self._broker.namespace}:"
        suffix = f"{_HELD}{handler}" if handler else ""
        source = f"{prefix}{queue}{suffix}"
        try:
            looked_at = self._ends_of(source)
        except ResponseError as error:
            if is_wrong_type(error):
                return 0  # not a queue
            raise
        length = looked_at[0]
        if self._left_alone.get(source) == looked_at:
            return 0
        # What fits one call is older than all that is on the new queue. Of more, each call would get before the last.
        from_end = handler is not None or length <= _MAX_MESSAGES
        pairs: list[str | int] = [word for pair in self._queue_of.items() for word in pair]
        moved = kept = 0
        left = length
        while left and moved + kept < length:
            delay = ".DQ" if queue.endswith(".DQ") else ""
            arguments = [self._epoch, prefix, delay, suffix, int(from_end), kept, _MAX_MESSAGES, _MAX_BYTES, *pairs]
            more, keep, left = self._move(keys=[f"{prefix}__relay__", source, f"{prefix}{queue}"], args=arguments)
            if more == -1:
                raise RedisLost
            if more == -2:
                raise NewerRelay(f"a newer relay has taken over from epoch {self._epoch}")
            moved, kept = moved + more, kept + keep
            yield
        if moved:
            log.warning("moved messages to the queue that their route names today", of=queue + suffix, messages=moved)
        if len(self._left_alone) >= 2 * _MAX_NAMES:
            self._left_alone.clear()
        self._left_alone[source] = self._ends_of(source)
        return moved

    def _ends_of(self, source: str) -> tuple[int, object, object]:
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.llen(source)
            pipeline.lindex(source, 0)
            pipeline.lindex(source, -1)
            length, first, last = pipeline.execute()
        return int(length), first, last
