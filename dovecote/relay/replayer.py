"""Run replays from the relay, beside the live events and without delaying them.

A replay goes in waves. A wave is sent; when each of its events is acted on or in `deliveries`, that is recorded and
the next one follows. So few events of a replay are ever queued before a live one, a pause or a cancel holds after
one wave, and what a crash or a wiped Redis takes away is one wave: the next relay reads it again from the recorded
cursor, and `processed_events` knows what of it was done.

For an ordered handler acting again, the events of one aggregate in a wave are one bundle: they are taken in order,
and those of the next wave find the ones that failed in `deliveries` (docs/adr/0016-replays.md).
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import structlog

from dovecote.broker.publisher import Publisher, QueuedBundle
from dovecote.relay.bundler import Bundler, bundle, packed
from dovecote.route import Route
from dovecote.store.active_replays import ActiveReplay, ActiveReplays
from dovecote.store.envelopes import past_unreadable
from dovecote.store.leases import MAX_BUNDLE_BYTES
from dovecote.store.published_batches import batches_of
from dovecote.store.reader import Connection, Reader
from dovecote.store.replays import KNOWN_BY_KEY, ReplaySelection, is_finished, is_matched
from dovecote.store.unsendable import Unreadable, record_unreadable

log = structlog.get_logger()

_POLL_INTERVAL_SECONDS = 0.5
# While none is active: the start of one sends a notification.
_IDLE_POLL_INTERVAL_SECONDS = 5.0
# A wave should take no longer than this, for the live events behind it, unless one event takes longer.
_WAVE_SECONDS = 0.25
_MAX_EVENTS = 2_000
# Of all envelopes of a wave: it is in memory until it is finished, beside the live events.
_MAX_WAVE_BYTES = 2_000_000
# Positions read at once; more while little matches. A statement of the relay must stay short.
_FIRST_SPAN, _MAX_SPAN = 2_000, 512_000
_SLOW_READ_SECONDS = 0.05
# Sent and not finished for so long: published once more, which adds only what is no longer queued.
_REPEAT_SECONDS = 30.0
_MIN_PAUSE_SECONDS = 0.005

# A finished event comes without an envelope, what is large with its id instead (dovecote/store/envelopes.py).
_WAVE = """
    select position, id, aggregate_type, aggregate_id,
           case when octet_length(envelope) <= %(max_small_bytes)s then convert_to(envelope, 'UTF8')
                when not finished then uuid_send(id) end
    from (
        select o.position, o.id, o.aggregate_type, o.aggregate_id, {finished} as finished,
               case when not {finished} then dovecote.small_envelope(o) end as envelope
        from dovecote.outbox o
        {known}
        where o.position > %(after)s and o.position <= %(before)s and {conditions} and {matched}
        order by o.position limit %(limit)s
    ) as read order by position
"""

_OF_SINGLE_EVENTS = " and o.position <@ (select positions from dovecote.replays where id = %(replay)s)"

_UNFINISHED = """
    select o.id from unnest(%(ids)s::uuid[]) as o (id) {known} where not {finished}
"""


class Event(NamedTuple):
    """One event of a wave; `envelope` is None where there is nothing left to do."""

    position: int
    id: UUID
    aggregate: tuple[str, str]
    envelope: bytes | None


@dataclass
class _Wave:
    """What was sent and is not finished. Everything of the replay up to `cursor` is in it or before it."""

    cursor: int
    events: int
    bundles: Sequence[QueuedBundle]
    unfinished: list[UUID]
    sent_at: float
    repeat_at: float


@dataclass
class _Run:
    replay: ActiveReplay
    route: Route
    asked: ReplaySelection
    fields: dict[str, Any]
    cursor: int
    size: int
    span: int = _FIRST_SPAN
    wave: _Wave | None = None
    next_at: float = 0.0


class Replayer:
    """Works on every active replay, a little at each call."""

    def __init__(
        self,
        *,
        connection: Connection,
        reader: Reader,
        bundler: Bundler,
        broker: Publisher,
        routes: Sequence[Route],
        epoch: int,
        retry_while_unavailable: Callable[[Callable[[], object]], None],
        postponed: Collection[str] = (),
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._bundler = bundler
        self._broker = broker
        self._routes = {route.handler: route for route in routes}
        self._epoch = epoch
        self._retry_while_unavailable = retry_while_unavailable
        self._postponed = postponed
        self._runs: dict[UUID, _Run] = {}
        self._active = ActiveReplays(connection, epoch)
        self._next_look = 0.0

    def look(self) -> None:
        """Read the active replays at the next step: one has begun or ended, or its handler was resumed."""
        self._next_look = 0.0

    def forget_waves(self) -> None:
        """Read again what was sent and is not finished: Redis may have lost it."""
        for run in self._runs.values():
            run.wave, run.next_at = None, 0.0

    def step(self) -> None:
        """Do what is due now: at most one wave for each active replay."""
        if time.monotonic() >= self._next_look:
            self._look_for_replays()
            self._next_look = time.monotonic() + (_POLL_INTERVAL_SECONDS if self._runs else _IDLE_POLL_INTERVAL_SECONDS)
        for run in list(self._runs.values()):
            if time.monotonic() >= run.next_at:
                if run.replay.handler_name in self._postponed:
                    # Its postponed events come first.
                    run.next_at = time.monotonic() + _POLL_INTERVAL_SECONDS
                elif run.wave is None:
                    self._send_wave(run)
                else:
                    self._finish(run, run.wave)

    def seconds_until_due(self) -> float:
        """Return how long the relay may sleep without delaying a replay."""
        if not self._runs:
            return float("inf")
        due_at = min(self._next_look, *(run.next_at for run in self._runs.values()))
        return max(0.0, due_at - time.monotonic())

    def _look_for_replays(self) -> None:
        active = self._active.rows()
        for id in self._runs.keys() - active.keys():
            del self._runs[id]
        for id, replay in active.items():
            route = self._routes.get(replay.handler_name)
            if route is not None and id not in self._runs and (asked := self._active.asked(replay, route)) is not None:
                fields = asked.parameters(route.handler, route.event_types)
                fields |= {"replay": id, "asked_at": replay.created_at}
                size = min(route.bundle_size, _MAX_EVENTS)
                self._runs[id] = _Run(replay, route, asked, fields, replay.cursor_position, size)

    # Sending ---------------------------------------------------------------------------------

    def _send_wave(self, run: _Run) -> None:
        began = time.monotonic()
        # What lies above the high-water mark will be published anyway.
        upto = min(run.replay.upto_position, self._reader.high_water_mark)
        before = min(run.cursor + run.span, upto)
        events, full = self._read(run, before) if before > run.cursor else ([], False)
        read_at = time.monotonic()
        self._adapt_span(run, read_at - began)
        if not events:
            run.cursor = max(run.cursor, before)
            run.next_at = 0.0 if before < upto else read_at + _POLL_INTERVAL_SECONDS
            if run.cursor >= run.replay.upto_position:
                self._record(run, run.cursor, 0)
            return
        if run.route.ordered and run.replay.mode == "reprocess":
            kept = whole_aggregates(events, run.route.bundle_size)
            full = full or len(kept) < len(events)
            events = kept
        bundles = self._bundles(run, [event for event in events if event.envelope is not None])
        if bundles:
            self._retry_while_unavailable(lambda: self._broker.publish(self._epoch, bundles))
        now = time.monotonic()
        run.wave = _Wave(
            cursor=events[-1].position if full else before,
            events=len(events),
            bundles=bundles,
            unfinished=[event.id for event in events if event.envelope is not None],
            sent_at=now,
            repeat_at=now + _REPEAT_SECONDS,
        )
        run.next_at = now + _MIN_PAUSE_SECONDS

    def _read(self, run: _Run, before: int) -> tuple[list[Event], bool]:
        """Return the next events, and whether more may match. What cannot be read is dead, and nothing left to do."""
        asked = run.asked.conditions()
        query = _WAVE.format(
            finished=is_finished(run.replay.mode),
            known=KNOWN_BY_KEY,
            conditions=asked + (_OF_SINGLE_EVENTS if run.replay.of_single_events else ""),
            matched=is_matched(run.replay.mode),
        )
        limit = self._max_events(run)
        fields = {**run.fields, "after": run.cursor, "before": before, "limit": limit}
        fields["max_small_bytes"] = _MAX_WAVE_BYTES // limit
        with self._connection.cursor(binary=True) as cursor:
            rows = past_unreadable(self._connection, query, lambda query: cursor.execute(query, fields).fetchall())
        made = self._reader.envelopes.made([envelope for *_, envelope in rows if envelope is not None])
        events: list[Event] = []
        unreadable: list[Unreadable] = []
        size = 0
        full = len(rows) == limit
        for position, id, aggregate_type, aggregate_id, given in rows:
            envelope, problem = (None, None) if given is None else next(made)
            size += len(envelope or b"")
            if events and size > _MAX_WAVE_BYTES:
                full = True
                break
            if problem is not None:
                unreadable.append(Unreadable(run.route.handler, position, problem))
            events.append(Event(position, id, (aggregate_type, aggregate_id), envelope or None))
        again = run.replay.id if run.replay.mode == "reprocess" else None
        record_unreadable(self._connection, self._epoch, unreadable, again)
        return events, full

    def _max_events(self, run: _Run) -> int:
        if run.replay.rate is None:
            return run.size
        return max(1, min(run.size, int(run.replay.rate * _WAVE_SECONDS)))

    @staticmethod
    def _adapt_span(run: _Run, took_seconds: float) -> None:
        if took_seconds > _SLOW_READ_SECONDS:
            run.span = max(_FIRST_SPAN, run.span // 2)
        elif took_seconds < _SLOW_READ_SECONDS / 2:
            run.span = min(_MAX_SPAN, run.span * 2)

    def _bundles(self, run: _Run, events: Sequence[Event]) -> list[QueuedBundle]:
        if run.replay.mode == "backfill":
            parts = in_order(self._without_queued(run.route, events), run.route.bundle_size)
        elif run.route.ordered:
            parts = by_aggregate(events, run.route.bundle_size)
        else:
            parts = in_order(events, run.route.bundle_size)
        again = run.replay.id if run.replay.mode == "reprocess" else None
        return [
            bundle(
                run.route,
                # Not the id of the bundle that first brought these events.
                [*(event.position for event in part), -1],
                [event.envelope for event in part if event.envelope is not None],
                replay=again,
                salt=self._bundler.salt,
                sent_in=self._bundler.sent_in,
                key=self._bundler.key,
            )
            for part in parts
        ]

    def _without_queued(self, route: Route, events: Sequence[Event]) -> Sequence[Event]:
        """Leave out what is still queued as it was published first."""
        queued: set[int] = set()

        def ask() -> None:
            if self._broker.holds_messages(route.queue):
                cut = [
                    (bundle.id, positions)
                    for batch in batches_of(self._connection, [event.position for event in events])
                    for bundle, positions in self._bundler.bundles_with_positions(self._reader.rows_in(batch.positions))
                    if bundle.handler == route.handler
                ]
                found = self._broker.which_are_queued(route.queue, [id for id, _ in cut])
                queued.update(position for id, inside in cut if id in found for position in inside)

        self._retry_while_unavailable(ask)
        return [event for event in events if event.position not in queued]

    # Finishing -------------------------------------------------------------------------------

    def _finish(self, run: _Run, wave: _Wave) -> None:
        query = _UNFINISHED.format(known=KNOWN_BY_KEY, finished=is_finished(run.replay.mode))
        found = self._connection.execute(query, {**run.fields, "ids": wave.unfinished})
        wave.unfinished = [id for (id,) in found]
        now = time.monotonic()
        took = now - wave.sent_at
        if wave.unfinished:
            run.next_at = now + min(max(took / 4, _MIN_PAUSE_SECONDS), _POLL_INTERVAL_SECONDS)
            if now >= wave.repeat_at:
                wave.repeat_at = now + _REPEAT_SECONDS
                self._retry_while_unavailable(lambda: self._broker.publish(self._epoch, wave.bundles))
            return
        if took > 2 * _WAVE_SECONDS:
            run.size = max(1, run.size // 2)
        elif took < _WAVE_SECONDS / 2 and wave.events >= run.size:
            run.size = min(_MAX_EVENTS, run.size * 2)
        run.wave = None
        run.next_at = wave.sent_at + wave.events / run.replay.rate if run.replay.rate else 0.0
        self._record(run, wave.cursor, wave.events)

    def _record(self, run: _Run, cursor: int, events: int) -> None:
        run.cursor = cursor
        finished = cursor >= run.replay.upto_position
        progress = self._active.record(run.replay.id, cursor, events, finished=finished)
        if progress is None:
            # Paused or cancelled, or we are no longer the leader, which the next record of a batch finds out.
            self._runs.pop(run.replay.id, None)
        elif finished:
            del self._runs[run.replay.id]
            log.info("replay done", replay=str(run.replay.id), handler=run.replay.handler_name, events=progress.done)


def in_order(events: Sequence[Event], most: int) -> list[list[Event]]:
    """Cut events into bundles of at most so many, as they come."""
    return packed([[event] for event in events], most, _event_bytes)


def by_aggregate(events: Sequence[Event], most: int) -> list[list[Event]]:
    """Cut events into bundles that share no aggregate. Expects what `whole_aggregates` returned."""
    of_aggregate: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        of_aggregate.setdefault(event.aggregate, []).append(event)
    return packed(of_aggregate.values(), most, _event_bytes)


def whole_aggregates(events: list[Event], most: int) -> list[Event]:
    """Return as many of the events, from the first on, as leave each aggregate small enough for one bundle."""
    counts: dict[tuple[str, str], int] = {}
    sizes: dict[tuple[str, str], int] = {}
    for index, event in enumerate(events):
        counts[event.aggregate] = counts.get(event.aggregate, 0) + 1
        sizes[event.aggregate] = sizes.get(event.aggregate, 0) + _event_bytes(event)
        if counts[event.aggregate] > most or (
            sizes[event.aggregate] > MAX_BUNDLE_BYTES and counts[event.aggregate] > 1
        ):
            return events[:index]
    return events


def _event_bytes(event: Event) -> int:
    return len(event.envelope or b"")
