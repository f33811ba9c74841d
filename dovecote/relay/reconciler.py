"""Finds what a queue has lost while Redis stayed the same, and sends it again.

An event was published long ago, is above its handler's low-water mark, is not finished, and is in no message that a
worker will get: then it would never be handled. This is the last line of defence, and what it finds is an unknown
fault: it is counted, and there is an alert.

The reads come in this order: Postgres (not finished), Redis (in no message), Postgres again (still not finished).
A worker commits before it acknowledges: with the first two alone, what is acknowledged in between would be sent again.
"""

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from uuid import UUID

import structlog
from redis import RedisError

from dovecote.broker.publisher import Publisher, QueuedBundle
from dovecote.envelope.signatures import NoMessageKey, valid_keys
from dovecote.errors import NewerRelay, RedisLost
from dovecote.relay import recovery
from dovecote.relay.bundler import Bundler
from dovecote.relay.queue_search import QueueSearch
from dovecote.route import Route
from dovecote.settings import Relay as RelaySettings
from dovecote.store import progress, published_batches
from dovecote.store.positions import multirange
from dovecote.store.reader import Connection, Reader
from dovecote.store.unsendable import Unreadable, record_unreadable, report
from dovecote.telemetry.instrumentation import RelayInstrumentation

log = structlog.get_logger()

# Of one search for a handler: events that are read, of these the events that are looked up in Redis, and events of the
# batches that are cut again.
_READ_EVENTS, _ASKED_EVENTS, _CUT_EVENTS = 5_000, 2_000, 20_000
_MIN_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 60.0
# Of a queue that is too long to be read: how often that is logged, and how long it is not read.
_TOO_LONG_SECONDS = 600.0
# Events that were sent again and may still be on their way; beyond, the next are looked for when these are done.
_MAX_SENT_AGAIN = 100_000


class Reconciler:
    """Searches from time to time until the end of the block, in a thread of its own. An error ends neither.

    connect         opens a session for the block it is entered for
    bundler         the leader's: what is sent again is cut as it was
    published_upto  the highest position that this leader has published; asked from another thread
    """

    def __init__(
        self,
        *,
        connect: Callable[[], AbstractContextManager[Connection]],
        broker: Publisher,
        bundler: Bundler,
        routes: Sequence[Route],
        settings: RelaySettings,
        epoch: int,
        published_upto: Callable[[], int],
        instrumentation: RelayInstrumentation | None = None,
    ) -> None:
        self._connect = connect
        self._broker = broker
        self._queued = QueueSearch(broker)
        self._bundler = bundler
        self._routes = {route.handler: route for route in routes}
        self._settings = settings
        self._epoch = epoch
        self._published_upto = published_upto
        self._instrumentation = instrumentation or RelayInstrumentation()
        after = settings.reconcile_after_seconds
        self._pause = min(_MAX_PAUSE_SECONDS, max(_MIN_PAUSE_SECONDS, after / 10))
        self._looked_upto: int | None = None
        self._goes_on = False
        # When which events were sent again: they are given the same time as all others.
        self._sent_again: dict[tuple[str, UUID], float] = {}
        # Whose queue was too long, and until when it is left alone.
        self._too_long: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciling", daemon=True)

    def __enter__(self) -> "Reconciler":
        for handler in self._routes:
            self._instrumentation.reconciled(handler, 0)  # an alert needs a counter that grows, not one that appears
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        # A daemon: a server that does not answer keeps no relay from ending. What is sent late is sent twice at most.
        self._thread.join(2.0)

    def _run(self) -> None:
        while not self._stopping.wait(_MIN_PAUSE_SECONDS if self._goes_on else self._pause):
            upto = self._published_upto()
            if upto == self._looked_upto:  # nothing was open, and nothing has been published since
                continue
            try:
                with self._connect() as connection:
                    self._looked_upto = None if self.look(connection, upto) else upto
            except (RedisError, RedisLost, NewerRelay, NoMessageKey):
                self._looked_upto, self._goes_on = None, False  # the leader handles it
            except Exception as error:
                self._looked_upto, self._goes_on = None, False
                what = f"{type(error).__name__}: {error}".partition("\n")[0]
                log.warning("the search for lost events failed; it is tried again", error=what)

    def look(self, connection: Connection, upto: int) -> bool:
        """Send again what is lost, as far as one look sees; return whether anything is open up to that position.

        Errors: psycopg.Error, RedisLost, NewerRelay, NoMessageKey, RedisError.
        """
        now, longest = time.monotonic(), max(map(self._min_age_seconds, self._routes.values()))
        self._sent_again = {sent: at for sent, at in self._sent_again.items() if now - at < longest}
        found = progress.open_handlers(connection, list(self._routes), upto, self._epoch)
        self._goes_on = False
        self._queued.keys = valid_keys(connection) if found else {}
        for handler, ranges, low, is_due in found:
            waits = now < self._too_long.get(handler, now) or len(self._sent_again) >= _MAX_SENT_AGAIN
            if is_due and not waits and not self._stopping.is_set():
                route = self._routes[handler]
                # At the head: queues are first in, first out, and what is lost further back becomes the head. And
                # somewhere behind it, in case that what is at the head stays there.
                self._look_at(connection, route, ranges, low)
                if upto - low > _READ_EVENTS:
                    self._look_at(connection, route, ranges, random.randint(low, upto))
        return bool(found)

    def _look_at(self, connection: Connection, route: Route, ranges: str, begin: int) -> None:
        lost = self._lost(connection, route, ranges, begin)
        sent = self._send(connection, route, lost) if lost else 0
        if sent:
            self._goes_on = True  # there may be more
            self._instrumentation.reconciled(route.handler, sent)
            log.warning(
                "events were lost by the queue and sent again", handler=route.handler, queue=route.queue, events=sent
            )

    def _lost(self, connection: Connection, route: Route, ranges: str, begin: int) -> dict[int, UUID]:
        """Return the position and the event of what is lost, in order."""
        positions = self._unfinished(connection, route, ranges, begin)
        if not positions:
            return {}
        known = published_batches.published_long_ago(connection, positions, self._min_age_seconds(route)).items()
        asked = {position: event for position, event in known if (route.handler, event) not in self._sent_again}
        asked = dict(islice(asked.items(), _ASKED_EVENTS))
        left = self._queued.not_queued(route.queue, route.handler, asked.values()) if asked else set()
        if asked and self._queued.gave_up:
            self._too_long[route.handler] = time.monotonic() + _TOO_LONG_SECONDS
            log.warning("queue is too long to look for lost events", handler=route.handler, queue=route.queue)
        missing = [position for position, event in asked.items() if event in left]
        if not missing:
            return {}
        return {position: asked[position] for position in self._unfinished(connection, route, multirange(missing))}

    def _unfinished(self, connection: Connection, route: Route, ranges: str, begin: int = 0) -> Sequence[int]:
        return progress.unfinished(connection, [route.handler], ranges, begin, _READ_EVENTS).get(route.handler, [])

    def _send(self, connection: Connection, route: Route, lost: Mapping[int, UUID]) -> int:
        """Queue what is lost, in the messages that it was in; return how many events that was."""
        reader = Reader(connection, self._published_upto(), self._settings.batch_size, self._settings.batch_bytes)
        wanted = {route.handler: lost.keys()}
        sent: set[int] = set()
        events = 0
        for batch in published_batches.batches_and_blocks_of(connection, list(lost)):
            if events > _CUT_EVENTS:
                break
            events += batch.events
            for bundle, inside in recovery.cut(
                reader, self._bundler, [batch], wanted, partial(self._give_up, connection)
            ):
                # An event of two batches, sent twice when a leader ended in between, is sent once here.
                fresh = lost.keys() & set(inside) - sent
                if fresh and self._queue(route, bundle):
                    sent |= fresh
        self._sent_again |= dict.fromkeys(((route.handler, lost[position]) for position in sent), time.monotonic())
        return len(sent)

    def _queue(self, route: Route, bundle: QueuedBundle) -> bool:
        # Its text may be there and yet in no list: then it is put back.
        return self._broker.publish(self._epoch, [bundle]) > 0 or self._queued.requeue(
            self._epoch, route.queue, route.handler, bundle.id
        )

    def _give_up(self, connection: Connection, rows: Sequence[Unreadable]) -> None:
        report({row.position: row.problem for row in rows})
        record_unreadable(connection, self._epoch, rows)

    def _min_age_seconds(self, route: Route) -> float:
        """Return how many seconds ago an event must have been published to be looked for."""
        own = self._settings
        return max(own.reconcile_after_seconds, own.retry_lease_seconds, route.time_limit_seconds)
