"""From rows to Dramatiq messages: one bundle for each handler, in order, up to the route's size.

A bundle's id is a digest of its handler, positions and events, salted with the history. Within a history the same
batch always gives the same bundles, so a batch that is published again adds only what is no longer queued. Positions
alone would not do: Postgres gives them out again after a failover that lost the transactions they were for, while
messages of those are still queued.
"""

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from hashlib import blake2b
from typing import TypeVar
from uuid import UUID

from dovecote.broker.publisher import QueuedBundle
from dovecote.envelope.signatures import MessageKey
from dovecote.envelope.wire import END, EVENT_ID, unsigned_message
from dovecote.route import Route, distinct
from dovecote.store.leases import MAX_BUNDLE_BYTES, DueDelivery
from dovecote.store.reader import Row, positions

Item = TypeVar("Item")


class Bundler:
    """Cuts rows into bundles, one message each, by the routes."""

    def __init__(
        self,
        routes: Sequence[Route],
        salt: bytes = b"",
        sent_in: str | None = None,
        key: MessageKey | None = None,
    ) -> None:
        #: What messages are signed with; without one no consumer acts on them.
        self.key = key
        #: The run of Postgres in which the rows are read (dovecote/store/lookup.py).
        self.sent_in = sent_in
        #: Of dovecote/relay/history.py. A late acknowledgement of a message that was dropped takes away that one only.
        self.salt = salt
        routes = distinct(routes)
        self._by_handler = {route.handler: route for route in routes}
        self._by_type: dict[str, list[Route]] = {}
        for route in routes:
            for event_type in route.event_types:
                self._by_type.setdefault(event_type, []).append(route)

    @property
    def types(self) -> Set[str]:
        """The event types with at least one route."""
        return self._by_type.keys()

    def routes_for(self, event_type: str) -> Sequence[Route]:
        """Return the routes subscribed to this event type."""
        return self._by_type.get(event_type, ())

    def bundles(self, rows: Iterable[Row], upto: Mapping[str, int] | None = None) -> Iterator[QueuedBundle]:
        """Yield the messages for these rows, made one by one; a row without a route is in none.

        The handlers of `upto` are sent what lies at or below their position there, and no more.
        """
        return (bundle for bundle, _ in self.bundles_with_positions(rows, upto))

    def bundles_with_positions(
        self, rows: Iterable[Row], upto: Mapping[str, int] | None = None
    ) -> Iterator[tuple[QueuedBundle, list[int]]]:
        """Yield the messages, each with the positions in it. A row whose envelope cannot be made is in none."""
        parts: dict[str, _Part] = {}
        for row in rows:
            position, event_type, envelope = row
            size = len(envelope)
            for route in self._by_type.get(event_type, ()) if size else ():
                if upto and position > upto.get(route.handler, position):
                    continue
                part = parts.get(route.handler)
                if part is None:
                    part = parts[route.handler] = _Part(route)
                elif part.counted == route.bundle_size:
                    yield part.message(self)
                    part.counted = 0
                elif part.size + size > MAX_BUNDLE_BYTES:
                    yield part.message(self)
                part.rows.append(row)
                part.counted += 1
                part.size += size
        for part in parts.values():
            yield part.message(self)

    def bundles_of(self, route: Route, rows: Sequence[Row]) -> Iterator[QueuedBundle]:
        """Yield the messages for one handler, which is subscribed to all of these rows."""
        for part in _parts([row for row in rows if row[2]], route.bundle_size, lambda row: len(row[2])):
            yield bundle(
                route,
                positions(part),
                [envelope for _, _, envelope in part],
                salt=self.salt,
                sent_in=self.sent_in,
                key=self.key,
            )

    def retries(self, due: Iterable[DueDelivery]) -> Iterator[QueuedBundle]:
        """Yield the messages for deliveries of our handlers that are due.

        What was leased together first goes in the same messages each time, whatever else is due by now.
        """
        together: dict[tuple[str, UUID | None, int], list[DueDelivery]] = {}
        for delivery in due:
            key = delivery.handler_name, delivery.replay_id, delivery.first_leased_at
            together.setdefault(key, []).append(delivery)
        for (handler, replay, _), its_due in together.items():
            for part in _retry_parts(self._by_handler[handler], its_due):
                yield bundle(
                    self._by_handler[handler],
                    # The next try is another message, also while the last one is not acknowledged yet. Sent again after
                    # its lease, it is the same.
                    [number for one in part for number in (one.position, one.changed_at)],
                    [one.envelope for one in part],
                    retry=True,
                    replay=replay,
                    salt=self.salt,
                    sent_in=self.sent_in,
                    key=self.key,
                )


class _Part:
    """What goes into the next message of a route: `counted` of its `bundle_size` rows, in `size` bytes.

    Where a bundle is cut for its bytes the count goes on, so that the cuts after it are where they would be without.
    """

    __slots__ = ("counted", "route", "rows", "size")

    def __init__(self, route: Route) -> None:
        self.route = route
        self.rows: list[Row] = []
        self.counted = self.size = 0

    def message(self, of: Bundler) -> tuple[QueuedBundle, list[int]]:
        inside, envelopes = positions(self.rows), [envelope for _, _, envelope in self.rows]
        made = bundle(self.route, inside, envelopes, salt=of.salt, sent_in=of.sent_in, key=of.key)
        self.rows, self.size = [], 0
        return made, inside


def _retry_parts(route: Route, due: Sequence[DueDelivery]) -> list[list[DueDelivery]]:
    """Cut into bundles. Of an ordered route one aggregate's go together, or the second message waits for the first.

    What is more of one aggregate than a message may have, which the lease does not return, goes in several, in order.
    """
    of_aggregate: dict[tuple[str, str] | UUID, list[DueDelivery]] = {}
    for one in due:
        together = (one.aggregate_type, one.aggregate_id) if route.ordered else one.event_id
        of_aggregate.setdefault(together, []).append(one)
    groups = [part for its_due in of_aggregate.values() for part in _parts(its_due, route.bundle_size, _due_bytes)]
    return packed(groups, route.bundle_size, _due_bytes)


def packed(groups: Iterable[Sequence[Item]], most: int, size_of: Callable[[Item], int]) -> list[list[Item]]:
    """Fill bundles with whole groups, within the count and the bytes a message may have."""
    bundles: list[list[Item]] = []
    room = room_bytes = 0
    for group in groups:
        size = sum(map(size_of, group))
        if not bundles or len(group) > room or size > room_bytes:
            bundles.append([])
            room, room_bytes = most, MAX_BUNDLE_BYTES
        bundles[-1] += group
        room, room_bytes = room - len(group), room_bytes - size
    return bundles


def _parts(items: Sequence[Item], most: int, size_of: Callable[[Item], int]) -> Iterator[Sequence[Item]]:
    for chunk in _chunks(items, most):
        start, size = 0, 0
        for end, item in enumerate(chunk):
            if end > start and size + size_of(item) > MAX_BUNDLE_BYTES:
                yield chunk[start:end]
                start, size = end, 0
            size += size_of(item)
        yield chunk[start:]


def _due_bytes(due: DueDelivery) -> int:
    return len(due.envelope)


def _chunks(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), most):
        yield items[start : start + most]


@cache
def _digest_key(handler: str) -> bytes:
    """A key has 64 bytes at most: of a longer name it is a digest, so that all of it counts."""
    name = handler.encode()
    return name if len(name) <= blake2b.MAX_KEY_SIZE else blake2b(name).digest()


def bundle(
    route: Route,
    identity: Sequence[int],
    envelopes: Sequence[bytes],
    *,
    retry: bool = False,
    replay: UUID | None = None,
    salt: bytes = b"",
    sent_in: str | None = None,
    key: MessageKey | None = None,
) -> QueuedBundle:
    """Return a message. Its id is a digest of the handler, these numbers, the events, the replay and the salt.

    Without a key it is not signed, and no consumer acts on it.
    """
    digest = blake2b(array("q", identity).tobytes(), digest_size=16, key=_digest_key(route.handler), salt=salt)
    digest.update(b"".join([envelope[EVENT_ID] for envelope in envelopes]))
    if replay is not None:
        digest.update(replay.bytes)
    id = ("r" if retry else "b") + digest.hexdigest()
    message = unsigned_message(route.queue, route.handler, id, envelopes, retry=retry, replay=replay, sent_in=sent_in)
    message = message + END if key is None else key.signed(message)
    return QueuedBundle(route.handler, route.queue, id, message)
