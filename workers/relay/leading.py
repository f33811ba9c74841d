"""What the leading relay does: read, publish, record, and sleep until the bell rings.

It sends first and records then, so a crash between the two sends events twice, never zero times;
consumers are written for that. Nothing else in the system declares an event published.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import psycopg
import structlog

from workers import pauses, replays
from workers.broker import NewerRelay, OutboxBroker, QueuedBundle, RedisLost
from workers.redis_client import PASSING
from workers.relay import leases, missing
from workers.relay.ahead import ReadAhead
from workers.relay.bundles import Bundler
from workers.relay.envelopes import Made
from workers.relay.gaps import writers_at_work
from workers.relay.leases import DueDelivery
from workers.relay.positions import multirange
from workers.relay.postponed import Postponer
from workers.relay.reading import Batch, Connection, Reader, positions
from workers.relay.replaying import Replayer
from workers.relay.sequence import SequenceWatch
from workers.relay.setting_aside import Unreadable, report, set_aside
from workers.relay.sleeping import Sleeper
from workers.relay.standby import Standby
from workers.relay.unrouted import Unrouted
from workers.routes import Route
from workers.settings import Relay as RelaySettings
from workers.telemetry import publishing
from workers.telemetry.meters import RelayMeters

log = structlog.get_logger()

_TICK_SECONDS = 1.0
# A dead worker is found this long after its heartbeat's time-out.
_REAP_SECONDS = 2.0
_PARTITIONS_SECONDS = 3_600.0
# How often what everybody has read is freed from Postgres's queue of notifications. Postgres does that when a NOTIFY
# commits; once the queue was full, there is none.
_FREE_NOTIFICATIONS_SECONDS = 60.0
# An event alone, or a few at once, are no traffic; more batches than that without a pause are.
_FEW_IN_A_ROW = 3
# What a transaction that saw us awake may wait after its end, as a share of what it took.
_SHARE_OF_A_TRANSACTION = 1 / 8
# So long may those who act on an event that came alone have the processor first.
_RECORD_LATER_SECONDS = 0.002

# Nothing is recorded by a relay that has been replaced: its epoch matches no row any more. The row is locked, which
# reads its newest version, and not written: each version would be walked over by the next batches for as long as
# anybody in the database holds a snapshot. The checkpoint follows once a second; what is published above it, a
# new reader learns from published_batches.
_RECORD = """
    insert into dovecote.published_batches (positions, events, epoch)
    select %(positions)s::int8multirange, %(events)s, owner.epoch
    from (select epoch from dovecote.relay_state where epoch = %(epoch)s for no key update) as owner
"""
_RECORD_CHECKPOINT = """
    update dovecote.relay_state set checkpoint = greatest(checkpoint, %s), seen_at = clock_timestamp()
    where epoch = %s
"""
_RECORD_REDIS = "update dovecote.relay_state set redis_run_id = %s where epoch = %s"


def known_redis(run_id: str, epoch: int) -> str:
    """Return what `relay_state` keeps of the Redis that holds what was published: its run id, and the epoch in it."""
    return f"{run_id}@{epoch}"


class Leader:
    """One leadership: one session that holds the lock and reads, one epoch.

    `records` is a second session, where batches are recorded while the next one is being read: on the first they would
    take turns, and Postgres would do nothing half of the time (docs/adr/0019-two-sessions.md).
    """

    def __init__(
        self,
        *,
        connection: Connection,
        reader: Reader,
        broker: OutboxBroker,
        routes: Sequence[Route],
        settings: RelaySettings,
        sleeper: Sleeper,
        epoch: int,
        known_redis: str | None,
        maintain: Callable[[], None] | None = None,
        meters: RelayMeters | None = None,
        records: Connection | None = None,
    ) -> None:
        self._connection = connection
        self._records = records or connection
        self._reader = reader
        self._broker = broker
        self._routes = routes
        self._bundler = Bundler(routes)
        self._settings = settings
        self._sleeper = sleeper
        self._epoch = epoch
        self._known_redis = known_redis
        self._maintain = maintain
        self._meters = meters or RelayMeters()
        self._ahead = ReadAhead(reader)
        self._sequence = SequenceWatch(connection, epoch)
        self._standby = Standby(settings, connection, self._records, sleeper, self._meters)
        self._postponed = Postponer(
            records=self._records,
            bundler=self._bundler,
            routes=routes,
            epoch=epoch,
            queue_bytes=settings.queue_bytes,
            batch_size=settings.batch_size,
            published_upto=reader.frontier,
            send=self._send,
            set_aside=self._give_up,
        )
        self._replayer = Replayer(
            connection=connection,
            reader=reader,
            bundler=self._bundler,
            broker=broker,
            routes=routes,
            epoch=epoch,
            through_outages=self._through_outages,
            postponed=self._postponed.after,
        )
        #: What is published up to; the reader itself may be a batch ahead.
        self.checkpoint = self._recorded_checkpoint = reader.checkpoint
        self._heard: set[str] = set()
        self._unrouted = Unrouted(self._bundler.types)
        self._cursors = {route.handler: leases.Cursor() for route in routes}
        self._holds_bell = False
        self._took_bell_at = 0.0
        # The writers that may have seen us awake before we took it; None until they are asked for.
        self._silent_writers: frozenset[int] | None = None
        self._called = False
        self._batches_in_a_row = 0
        self._pause_seconds = 0.0
        self._next_tick = self._next_reaping = self._next_partitions = self._next_freeing = time.monotonic()

    def lead(self) -> None:
        """Work until told to stop.

        Errors: psycopg.OperationalError when the connection is lost, NewerRelay when another has taken over.
        """
        with self._ahead:
            self._listen()
            # The relay before us may have ended between leasing a retry and sending it.
            leases.end_leases(self._connection)
            self._postponed.load()
            self._standby.await_flush()  # what leaders before us have published, and we may send again
            self._through_outages(self._greet_redis)
            self._through_outages(self._check_redis)
            while not self._sleeper.stopping:
                self._turn()
        self._record_checkpoint()
        self._unrouted.write(self._records)

    def _turn(self) -> None:
        self._meters.alive("leading")
        heard, self._heard = self._heard, set()
        called, self._called = self._called, False
        if self._holds_bell and self._silent_writers != frozenset():
            self._note_silent_writers()
        batch = self._ahead.take(at_once=called)
        if batch.rows:
            self._publish(batch)
        self.checkpoint = batch.checkpoint
        if "dovecote_deliveries" in heard:
            self._send_retries()
        if pauses.CHANNEL in heard:
            self._through_outages(self._take_back)
        if heard & {replays.CHANNEL, pauses.CHANNEL}:
            self._replayer.look()
        if time.monotonic() >= self._next_tick:
            self._tick()
        elif time.monotonic() >= self._postponed.next_look:
            self._through_outages(self._check_redis)
        self._postponed.step()
        self._replayer.step()
        if batch.rows:
            self._pause_seconds = 0.0
            self._batches_in_a_row += 1
            if self._batches_in_a_row > _FEW_IN_A_ROW:
                self._stay_awake()
                self._gather(batch)
        else:
            self._batches_in_a_row = 0
            if not self._heard:
                self._rest()

    # Publishing ------------------------------------------------------------------------------

    def _publish(self, batch: Batch) -> None:
        with publishing(batch.rows, self._bundler.routes_for):
            self._set_aside(batch)
            upto = self._postponed.admit(batch.rows)
            self._send(lambda: self._bundler.bundles(batch.rows, upto))
            if not self._batches_in_a_row and not batch.is_full:
                self._called = self._sleeper.sleep(_RECORD_LATER_SECONDS, self._connection)
            row = {"epoch": self._epoch, "positions": multirange(positions(batch.rows)), "events": len(batch.rows)}
            recorded = self._records.execute(_RECORD, row)
        self._require_ownership(recorded.rowcount)
        self._postponed.published(batch.rows)
        self._meters.published(len(batch.rows))
        self._unrouted.meet(batch.rows)
        if self._unrouted.has_news:
            self._unrouted.write(self._records)

    def _set_aside(self, batch: Batch) -> None:
        # Before the checkpoint passes them, and on the session that records it: what is lost in a crash of Postgres is
        # lost from the end. And before what comes after them is sent, which then waits behind what is known.
        types = {position: event_type for position, event_type, _ in batch.rows} if batch.problems else {}
        report(batch.problems)
        set_aside(
            self._records,
            self._epoch,
            [
                Unreadable(route.handler, position, problem)
                for position, problem in batch.problems.items()
                for route in self._bundler.routes_for(types[position])
            ],
        )

    def _send(self, bundles: Callable[[], Iterable[QueuedBundle]]) -> None:
        """Put messages on their queues. They are made one by one, and from the first again after an outage.

        From the first: what was sent of them before it may be lost, and is not recorded yet.
        """
        self._standby.await_flush()
        sent = 0
        queued: dict[str, int] = {}

        def publish() -> None:
            nonlocal sent
            sent = 0
            made = iter(bundles())
            if first := next(made, None):
                self._broker.publish(self._epoch, counted(first, made))

        def counted(first: QueuedBundle, others: Iterable[QueuedBundle]) -> Iterator[QueuedBundle]:
            nonlocal sent
            for bundle in chain((first,), others):
                sent += 1
                queued[bundle.queue] = queued.get(bundle.queue, 0) + len(bundle.message)
                yield bundle

        self._through_outages(publish)
        self._postponed.sent(queued)
        self._meters.sent(sent)

    def _record_checkpoint(self) -> None:
        if self.checkpoint > self._recorded_checkpoint:
            recorded = self._records.execute(_RECORD_CHECKPOINT, (self.checkpoint, self._epoch))
            self._require_ownership(recorded.rowcount)
            self._recorded_checkpoint = self.checkpoint

    def _require_ownership(self, rows_changed: int) -> None:
        if rows_changed != 1:
            raise NewerRelay(f"epoch {self._epoch} is over")

    # Redis comes and goes --------------------------------------------------------------------

    def _through_outages(self, work: Callable[[], object]) -> None:
        """Do the work; while Redis is away, wait for it. What it forgot meanwhile is sent again first."""
        tries = 0
        began = time.monotonic()
        while True:
            try:
                if tries:
                    self._greet_redis()
                work()
                if tries:
                    self._spare_workers(time.monotonic() - began)
                return
            except (*PASSING, RedisLost) as error:
                tries += 1
                self._meters.alive("waiting_for_redis")
                if tries in (3, 30) or tries % 300 == 0:
                    log.warning("waiting for redis", tries=tries, error=f"{type(error).__name__}: {error}")
                if self._sleeper.stopping:
                    raise
                self._sleeper.sleep(min(1.0, 0.02 * 2 ** min(tries, 8)))
                # The lock that makes us leader lives in this session: its end must not go unnoticed here.
                self._connection.execute("select")

    def _spare_workers(self, outage_seconds: float) -> None:
        """Give live workers time for a heartbeat before the reaper looks: they were cut off just as we were."""
        timeout_seconds = self._broker.heartbeat_timeout / 1_000
        if outage_seconds > timeout_seconds / 2:
            log.info("redis is back", after_seconds=round(outage_seconds, 1))
            self._next_reaping = max(self._next_reaping, time.monotonic() + timeout_seconds / 2)

    def _greet_redis(self) -> None:
        """Put our epoch into Redis; if it is not the Redis we knew, send again what it may have lost."""
        self._ahead.settle()
        run_id, _ = self._broker.identity()
        if not self._claims_as_known(run_id):
            # Until the last message is sent again no Redis is known: a crash in between starts this over.
            self._meters.alive("sending_again")
            self._know_redis(None)
            self._broker.claim_epoch(self._epoch)
            leases.end_leases(self._connection)
            self._replayer.forget_waves()
            found = missing.bundles(
                self._connection, self._reader, self._bundler, self._routes, self._give_up, self._postponed.after
            )
            sent = self._broker.publish(self._epoch, found)
            self._meters.republished(sent)
            if sent:
                log.warning("redis had lost messages; they were sent again", messages=sent)
        self._know_redis(known_redis(run_id, self._epoch))

    def _claims_as_known(self, run_id: str) -> bool:
        """Claim the epoch where this is the Redis that was recorded, with the marker that was recorded.

        The marker is compared where it is set: a flush in between, or the claim of a relay that woke up
        late, must not make an empty Redis look known (tests/models/hand_over.pml).
        """
        known_run_id, _, marker = (self._known_redis or "").rpartition("@")
        return run_id == known_run_id and self._broker.claim_epoch(self._epoch, expected=int(marker))

    def _know_redis(self, known: str | None) -> None:
        recorded = self._connection.execute(_RECORD_REDIS, (known, self._epoch))
        self._require_ownership(recorded.rowcount)
        self._known_redis = known

    def _check_redis(self) -> None:
        run_id, marker, usage = self._broker.look([(route.queue, route.handler) for route in self._routes])
        self._postponed.measured(usage)
        if marker is None or known_redis(run_id, marker) != self._known_redis:
            raise RedisLost

    # Once in a while -------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        self._next_tick = now + _TICK_SECONDS
        self._meters.alive("leading")
        self._sequence.look()
        self._record_checkpoint()
        self._unrouted.write(self._records)
        self._through_outages(self._check_redis)
        for route in leases.with_waiting(self._connection, self._routes):
            leases.release_strays(self._connection, route, self._cursors[route.handler])
        self._send_retries()
        if now >= self._next_reaping:
            self._next_reaping = now + _REAP_SECONDS
            self._through_outages(lambda: self._meters.reaped(self._broker.reap()))
            self._through_outages(self._take_back)
        if now >= self._next_freeing:
            self._next_freeing = now + _FREE_NOTIFICATIONS_SECONDS
            self._connection.execute("select pg_notification_queue_usage()")
        if now >= self._next_partitions:
            self._next_partitions = now + _PARTITIONS_SECONDS
            if self._maintain is not None:
                self._maintain()

    def _take_back(self) -> None:
        """Give handlers that were resumed what was put aside for them, also what was just being put aside."""
        aside = self._broker.holds_aside((route.queue, route.handler) for route in self._routes)
        if aside:
            paused = pauses.paused_handlers(self._connection)
            for queue, handler in aside:
                if handler not in paused:
                    self._broker.take_back(queue, handler)

    def _send_retries(self) -> None:
        envelopes = self._reader.envelopes
        due = leases.lease_due(
            self._connection,
            envelopes.most_rows,
            self._settings.retry_lease_seconds,
            self._routes,
            envelopes.most_of_small,
            but_for=sorted(self._postponed.full),
        )
        for part in envelopes.in_parts(due, [delivery.envelope for delivery in due]):
            self._give_up(
                [Unreadable(made.item.handler_name, made.item.position, made.problem) for made in part if made.problem]
            )
            self._send(partial(self._retries, part))
        # Those of handlers that are not ours are leased and left alone.
        self._meters.retried(sum(one.handler_name in self._cursors for one in due))
        if due:
            # There may be more: after the next batch of live events, and without a rest.
            self._heard.add("dovecote_deliveries")

    def _retries(self, part: Sequence[Made[DueDelivery]]) -> Iterator[QueuedBundle]:
        return self._bundler.retries(
            replace(made.item, envelope=made.envelope) for made in part if made.problem is None
        )

    def _give_up(self, rows: Sequence[Unreadable]) -> None:
        report({row.position: row.problem for row in rows})
        set_aside(self._connection, self._epoch, rows)

    # Sleeping and waking ---------------------------------------------------------------------

    def _listen(self) -> None:
        # A notification may arrive with the answer to any statement; asking the socket would miss it.
        def hear(notification: psycopg.Notify) -> None:
            self._heard.add(notification.channel)
            if notification.channel == "dovecote_outbox":
                self._meters.rang()

        self._connection.add_notify_handler(hear)
        for channel in ("dovecote_outbox", "dovecote_deliveries", replays.CHANNEL, pauses.CHANNEL):
            self._connection.execute(f"listen {channel}")

    def _stay_awake(self) -> None:
        if self._holds_bell:  # writers need not ring while we are up: ringing makes them commit one after the other
            self._connection.execute("select pg_advisory_unlock(dovecote.bell_key())")
            self._holds_bell = False

    def _gather(self, batch: Batch) -> None:
        # In traffic events travel together, or each would be a message and a transaction of its own.
        if not batch.is_full:
            self._sleeper.sleep(self._settings.gather_ms / 1_000)

    def _rest(self) -> None:
        if self._holds_bell:
            self._sleep_until_called()
            return
        row = self._connection.execute("select pg_try_advisory_lock(dovecote.bell_key())").fetchone()
        self._holds_bell = row == (True,)
        self._took_bell_at = time.monotonic()
        self._silent_writers = None
        if not self._holds_bell:
            # A writer looks at this moment whether we sleep, or holds the bell since before 0019. It will not ring.
            self._pause_seconds = min(self._settings.busy_poll_ms / 1_000, self._pause_seconds * 2 or 0.001)
            self._sleeper.sleep(self._pause_seconds)
        # With the bell in hand, read once more before sleeping: for what was written before we took it.

    def _note_silent_writers(self) -> None:
        """Remember who was at work when we took the bell: they saw us awake, or may have, and say nothing.

        Those that are over by now are found by the read that follows.
        """
        at_work = frozenset(xid for _, xid in writers_at_work(self._connection))
        self._silent_writers = at_work if self._silent_writers is None else self._silent_writers & at_work

    def _look_again_seconds(self) -> float:
        """Return the pause until the next read that nobody asks for.

        Until the last silent writer is over it is short at first, and then a share of the time they have taken: a
        transaction of a minute may wait for some seconds, and one that is forgotten keeps nobody busy.
        """
        if not self._silent_writers:
            return self._settings.poll_seconds
        taken = time.monotonic() - self._took_bell_at
        soon = min(self._settings.busy_poll_ms / 1_000, max(0.001, taken))
        return min(self._settings.poll_seconds, max(soon, taken * _SHARE_OF_A_TRANSACTION))

    def _sleep_until_called(self) -> None:
        """Until the bell rings or it is time to look anyway; retries and the reaper wait for neither."""
        pause = min(self._look_again_seconds(), self._replayer.seconds_until_due(), self._postponed.seconds_until_due())
        look_again = time.monotonic() + pause
        while not self._called and not self._heard and time.monotonic() < look_again:
            self._called = self._sleeper.sleep(min(look_again, self._next_tick) - time.monotonic(), self._connection)
            if time.monotonic() >= self._next_tick:
                self._tick()
