"""Handlers whose queue is full: their events stay in the outbox until there is room; other handlers are not affected.

A queue without consumers would grow until Redis is full, and a full Redis takes nothing for any queue. So each queue
has a bound in bytes. Beyond it the handler is postponed: a row in `postponed` says up to which published position it
was sent everything, batches leave it out from there on, and once its queue has room the relay sends what lies
above from the outbox, in order, until it has caught up with the batches. Then the row goes away.

All of it goes by what was *published*: positions at or below `published_upto`. A row that turns up late, in a gap, is
sent with its batch if it lies at or below the handler's `after_position`, and is found in the outbox if it lies
above. What both find is sent twice, and consumers absorb it.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import structlog

from dovecote.broker.publisher import QueuedBundle, RedisUsage
from dovecote.relay.bundler import Bundler
from dovecote.route import Route, queues
from dovecote.store.envelopes import Envelopes, Read
from dovecote.store.postponed import UNSENT, PostponedHandlers
from dovecote.store.reader import Connection, Row
from dovecote.store.unsendable import Unreadable

log = structlog.get_logger()

# A queue that holds less is never full: if other programs fill Redis, the relay waits as for an outage.
_LEAST_BOUND_BYTES = 1_000_000
# Positions read at once, and bytes sent at once: the batches of all others come between.
_SPAN = 20_000
_STEP_BYTES = 1_000_000
# While a full queue is being emptied, its consumers should not wait for the next tick.
_MIN_POLL_INTERVAL_SECONDS, _MAX_POLL_INTERVAL_SECONDS = 0.05, 1.0


class Postponer:
    """Knows how full each queue is, and postpones handlers. One for each leadership.

    `records` is the session that records batches. `send` publishes the bundles that it is given the means to make, and
    waits while Redis is away; `record_unreadable` dead-letters rows that cannot be read.
    """

    def __init__(
        self,
        *,
        records: Connection,
        bundler: Bundler,
        routes: Sequence[Route],
        epoch: int,
        queue_bytes: int,
        batch_size: int,
        published_upto: int,
        send: Callable[[Callable[[], Iterable[QueuedBundle]]], None],
        record_unreadable: Callable[[Sequence[Unreadable]], None],
    ) -> None:
        self._rows = PostponedHandlers(records, epoch)
        self._bundler = bundler
        self._routes = {route.handler: route for route in routes}
        self._queues = queues(routes)
        self._queue_bytes = self._bound = queue_bytes
        self._envelopes = Envelopes(records, batch_size, _STEP_BYTES)
        self._send = send
        self._record_unreadable = record_unreadable
        #: The highest position in a batch that was published.
        self.published_upto = published_upto
        #: The postponed handlers, and up to which published position each was sent everything.
        self.after: dict[str, int] = {}
        #: Handlers whose queue takes nothing for now, postponed or not.
        self.full: set[str] = set()
        self._queued: dict[str, int] = {}
        self._held: dict[str, int] = {}
        #: When to look again sooner than at the next tick.
        self.next_look = float("inf")
        self._pause = _MIN_POLL_INTERVAL_SECONDS

    def load(self) -> None:
        """Read the rows that the former leader has left."""
        self.after.update((name, after) for name, after in self._rows.after().items() if name in self._routes)

    # How full the queues are -----------------------------------------------------------------

    def measured(self, usage: RedisUsage) -> None:
        """Note what Redis holds, and which handlers have room."""
        before = self._sizes()
        self._queued, self._held = dict(usage.queued), dict(usage.held)
        self._bound = self._queue_bytes
        if usage.maxmemory:
            ours = sum(self._queued.values()) + sum(self._held.values())
            # Half of the memory of Redis stays free.
            shares = 2 * (len(self._queues) + sum(size > 0 for size in self._held.values()))
            self._bound = min(self._bound, (usage.maxmemory - usage.used + ours) // shares)
        self._bound = max(self._bound, _LEAST_BOUND_BYTES)
        self._judge()
        after = self._sizes()
        waiting = self.full & self.after.keys()
        is_emptied = any(after[handler] < before[handler] for handler in waiting)
        self._pause = _MIN_POLL_INTERVAL_SECONDS if is_emptied else min(_MAX_POLL_INTERVAL_SECONDS, 2 * self._pause)
        self.next_look = time.monotonic() + self._pause if waiting else float("inf")

    def sent(self, queued: Mapping[str, int]) -> None:
        """Count the bytes that were published on each queue since the last look."""
        for queue, size in queued.items():
            self._queued[queue] = self._queued.get(queue, 0) + size
        self._judge()

    def _sizes(self) -> dict[str, int]:
        # Held messages of a paused handler do not count for the others on its queue.
        return {
            handler: self._queued.get(route.queue, 0) + self._held.get(handler, 0)
            for handler, route in self._routes.items()
        }

    def _judge(self) -> None:
        for handler, size in self._sizes().items():
            if size >= self._bound:
                self.full.add(handler)
            elif size < self._bound / 2:
                self.full.discard(handler)

    # Leaving out and catching up -------------------------------------------------------------

    def admit(self, rows: Sequence[Row]) -> Mapping[str, int]:
        """Postpone the handlers that have no room for these rows, which are about to be published.

        Return up to which position each postponed handler is sent its rows; all others are sent all.
        Errors: NewerRelay.
        """
        too_much = self.full - self.after.keys()
        if too_much:
            types = {event_type for position, event_type, _ in rows if position > self.published_upto}
            for handler in sorted(too_much):
                if not types.isdisjoint(self._routes[handler].event_types):
                    self._postpone(handler)
                    self._pause, self.next_look = _MIN_POLL_INTERVAL_SECONDS, 0.0
        return self.after

    def published(self, rows: Sequence[Row]) -> None:
        """Note that a batch is recorded."""
        self.published_upto = max(self.published_upto, *(position for position, _, _ in rows))

    def seconds_until_due(self) -> float:
        """Return how long the relay may sleep without delaying a handler that has room."""
        if self.after.keys() - self.full:
            return 0.0
        return max(0.0, self.next_look - time.monotonic())

    def step(self) -> None:
        """Send some of what was left out to each postponed handler that has room. Errors: NewerRelay."""
        for handler in sorted(self.after.keys() - self.full):
            self._catch_up(self._routes[handler])

    def _postpone(self, handler: str) -> None:
        self._rows.postpone(handler, self.published_upto)
        self.after[handler] = self.published_upto
        log.warning(
            "queue is full; its handler is postponed",
            handler=handler,
            queue=self._routes[handler].queue,
            bytes=self._sizes()[handler],
            bound=self._bound,
            after_position=self.published_upto,
        )

    def _catch_up(self, route: Route) -> None:
        after = self.after[route.handler]
        before = min(after + _SPAN, self.published_upto)
        unsent = self._unsent(route, after, before)
        if unsent.problems:
            self._record_unreadable([Unreadable(route.handler, *problem) for problem in unsent.problems.items()])
        if unsent.rows:
            self._send(lambda: self._bundler.bundles_of(route, unsent.rows))
        upto = unsent.rows[-1][0] if unsent.is_cut else before
        if upto < self.published_upto:
            self._rows.advance(route.handler, upto)
            self.after[route.handler] = upto
        else:
            self._rows.end(route.handler)
            del self.after[route.handler]
            log.warning("handler has caught up; it is live again", handler=route.handler, queue=route.queue)

    def _unsent(self, route: Route, after: int, before: int) -> Read:
        """Return the next rows up to `before` that the handler was not sent."""
        handler = route.handler
        limit = self._envelopes.max_rows
        return self._envelopes.read(UNSENT, handler, handler, handler, after, before, route.event_types, limit)
