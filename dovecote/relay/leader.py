"""The loop of the leading relay: read, publish, record, and sleep until woken.

It sends first and records then, so a crash between the two sends events twice, never zero times;
consumers are written for that. Nothing else in the system declares an event published.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import structlog
from redis import RedisError

from dovecote.broker.publisher import Publisher, QueuedBundle
from dovecote.broker.redis_client import is_wrong_type
from dovecote.envelope.signatures import SigningKeys
from dovecote.errors import RedisLost
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay import recovery
from dovecote.relay.bundler import Bundler
from dovecote.relay.history import History
from dovecote.relay.leader_lock import LeaderLock
from dovecote.relay.postponer import Postponer
from dovecote.relay.renamed_queues import RenamedQueues
from dovecote.relay.replayer import Replayer
from dovecote.relay.standby_flush import StandbyFlush
from dovecote.relay.wakeup import Wakeup
from dovecote.route import Route
from dovecote.settings import Relay as RelaySettings
from dovecote.store import leases, pauses, published_batches, relay_state, replays
from dovecote.store.envelopes import Made
from dovecote.store.leases import DueDelivery
from dovecote.store.positions import multirange
from dovecote.store.reader import Batch, Connection, ReadAhead, Reader, positions
from dovecote.store.runs import outbox_run
from dovecote.store.sequence import SequenceWatch
from dovecote.store.unrouted import Unrouted
from dovecote.store.unsendable import Unreadable, record_unreadable, report
from dovecote.telemetry.instrumentation import RelayInstrumentation
from dovecote.telemetry.traces import publishing
from dovecote.unit_of_work.backoff import Backoff

log = structlog.get_logger()

_TICK_SECONDS = 1.0
# A dead worker is found so long after the time-out of its heartbeat.
_REAP_SECONDS = 2.0
_PARTITIONS_SECONDS = 3_600.0
# How often read notifications are removed from Postgres's queue. Postgres does that when a NOTIFY commits; while the
# queue is full, none does.
_FREE_NOTIFICATIONS_SECONDS = 60.0
# How often new foreign holders of our locks are logged.
_LOG_FOREIGN_LOCKS_SECONDS = 5.0
_BACKOFF = Backoff(first_seconds=0.04, max_seconds=1.0, log_first=3)
# More batches than this without a pause are traffic.
_FEW_IN_A_ROW = 3
# So long the consumers of an event that came alone have the processor first.
_RECORD_LATER_SECONDS = 0.002


class Leader:
    """One leadership: one session that reads, one epoch. It ends with the lock of the leader.

    `records` is a second session, where batches are recorded while the next one is being read: on the first they would
    take turns, and Postgres would be idle half of the time (docs/adr/0019-second-session-of-the-leader.md).
    """

    def __init__(
        self,
        *,
        connection: Connection,
        reader: Reader,
        broker: Publisher,
        routes: Sequence[Route],
        settings: RelaySettings,
        stop: StopFlag,
        history: History,
        maintain: Callable[[], None] | None = None,
        instrumentation: RelayInstrumentation | None = None,
        records: Connection | None = None,
        leadership: LeaderLock | None = None,
    ) -> None:
        self._connection = connection
        self._records = records or connection
        self._leadership = leadership
        self._reader = reader
        self._broker = broker
        self._routes = routes
        run = outbox_run(connection)
        self._keys = SigningKeys(connection)
        self._bundler = self.bundler = Bundler(routes, history.salt, run, self._keys.newest)
        self._settings = settings
        self._stop = stop
        self._history = history
        self._epoch = epoch = history.epoch
        self._maintain = maintain
        self._instrumentation = instrumentation or RelayInstrumentation()
        self._ahead = ReadAhead(reader)
        self._sequence = SequenceWatch(connection, epoch, run)
        self._standby = StandbyFlush(
            settings, connection, self._records, stop, self._instrumentation, self._send_heartbeat
        )
        self._postponed = Postponer(
            records=self._records,
            bundler=self._bundler,
            routes=routes,
            epoch=epoch,
            queue_bytes=settings.queue_bytes,
            batch_size=settings.batch_size,
            published_upto=reader.high_water_mark,
            send=self._send,
            record_unreadable=self._give_up,
        )
        self._replayer = Replayer(
            connection=connection,
            reader=reader,
            bundler=self._bundler,
            broker=broker,
            routes=routes,
            epoch=epoch,
            retry_while_unavailable=self._retry_while_unavailable,
            postponed=self._postponed.after,
        )
        self._renamed_queues = RenamedQueues(broker, routes, epoch)
        #: Up to here everything is published; the reader may be a batch ahead.
        self.checkpoint = self._recorded_checkpoint = reader.checkpoint
        self._wakeup = Wakeup(connection, stop, settings, self._instrumentation)
        self._unrouted = Unrouted(self._bundler.types)
        self._cursors = {route.handler: leases.Cursor() for route in routes}
        self._batches_in_a_row = 0
        self._next_foreign_locks = time.monotonic()
        self._next_tick = self._next_reaping = self._next_partitions = self._next_freeing = time.monotonic()

    def lead(self) -> None:
        """Work until stopped.

        Errors: psycopg.OperationalError when the connection is lost, NewerRelay when another has taken over or may.
        """
        with self._ahead:
            self._wakeup.listen()
            # The former leader may have ended between leasing a retry and sending it.
            leases.end_leases(self._connection)
            self._postponed.load()
            self._retry_while_unavailable(self._verify_redis)
            self._retry_while_unavailable(self._check_redis)
            # First, because what it moves is older than the first batch. What takes longer than a step follows later.
            self._retry_while_unavailable(self._renamed_queues.step)
            while not self._stop.is_set():
                self._turn()
        self._record_checkpoint()
        self._unrouted.write(self._records)

    @property
    def published_upto(self) -> int:
        """The highest position that is published, in order or not."""
        return max(self.checkpoint, self._postponed.published_upto)

    def _turn(self) -> None:
        self._require_leadership()
        self._instrumentation.alive("leading")
        heard, was_woken = self._wakeup.turn()
        batch = self._ahead.take(at_once=was_woken)
        if batch.rows:
            self._publish(batch)
        self.checkpoint = batch.checkpoint
        if "dovecote_deliveries" in heard:
            self._send_retries()
        if pauses.CHANNEL in heard:
            self._renamed_queues.next_look = 0.0
            self._retry_while_unavailable(self._resume_held)
        if heard & {replays.CHANNEL, pauses.CHANNEL}:
            self._replayer.look()
        if time.monotonic() >= self._next_tick:
            self._tick()
        elif time.monotonic() >= self._postponed.next_look:
            self._retry_while_unavailable(self._check_redis)
        self._postponed.step()
        self._replayer.step()
        if batch.rows:
            self._wakeup.busy()
            self._batches_in_a_row += 1
            if self._batches_in_a_row > _FEW_IN_A_ROW:
                self._wakeup.stay_awake()
                self._gather(batch)
        else:
            self._batches_in_a_row = 0
            self._wakeup.rest(was_woken=was_woken or bool(heard))
            if not self._wakeup.heard and self._wakeup.may_sleep():
                self._sleep()

    # Publishing ------------------------------------------------------------------------------

    def _publish(self, batch: Batch) -> None:
        with publishing(batch.rows, self._bundler.routes_for):
            self._record_unreadable(batch)
            upto = self._postponed.admit(batch.rows)
            self._send(lambda: self._bundler.bundles(batch.rows, upto))
            if not self._batches_in_a_row and not batch.is_full:
                self._wakeup.sleep(_RECORD_LATER_SECONDS)
            where = multirange(positions(batch.rows))
            recorded = published_batches.record(self._records, self._epoch, where, len(batch.rows))
        relay_state.require_leader(self._epoch, recorded)
        self._postponed.published(batch.rows)
        self._instrumentation.published(len(batch.rows))
        self._unrouted.meet(batch.rows)
        if self._unrouted.has_news:
            self._unrouted.write(self._records)

    def _record_unreadable(self, batch: Batch) -> None:
        # Before the checkpoint passes them, and on the session that records it: a crash of Postgres loses the latest
        # commits first. And before their successors are sent, which then wait behind them.
        types = {position: event_type for position, event_type, _ in batch.rows} if batch.problems else {}
        report(batch.problems)
        record_unreadable(
            self._records,
            self._epoch,
            [
                Unreadable(route.handler, position, problem)
                for position, problem in batch.problems.items()
                for route in self._bundler.routes_for(types[position])
            ],
        )

    def _send(self, bundles: Callable[[], Iterable[QueuedBundle]]) -> None:
        """Put messages on their queues, each made when it is sent.

        After an outage they are sent again from the first on: those sent before it may be lost, and are not recorded.
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

        self._retry_while_unavailable(publish)
        self._postponed.sent(queued)
        self._instrumentation.sent(sent)

    def _record_checkpoint(self) -> None:
        if self.checkpoint > self._recorded_checkpoint:
            relay_state.record_checkpoint(self._records, self._epoch, self.checkpoint)
            self._recorded_checkpoint = self.checkpoint

    def _send_heartbeat(self) -> None:
        self._require_leadership()
        self._history.send_heartbeat()

    def _require_leadership(self) -> None:
        if self._leadership is not None:
            self._leadership.require()

    # Redis comes and goes --------------------------------------------------------------------

    def _retry_while_unavailable(self, work: Callable[[], object]) -> None:
        """Do the work; while Redis is away, wait for it. What Redis has lost meanwhile is sent again first."""
        tries = 0
        began = time.monotonic()
        while True:
            try:
                if tries:
                    self._verify_redis()
                work()
                if tries:
                    self._spare_workers(time.monotonic() - began)
                return
            except (RedisError, RedisLost) as error:
                tries += 1
                if is_wrong_type(error):
                    self._mend()
                self._instrumentation.alive("waiting_for_redis")
                if _BACKOFF.should_log(tries):
                    log.warning("waiting for redis", tries=tries, error=f"{type(error).__name__}: {error}")
                if self._stop.is_set():
                    raise
                self._stop.sleep(_BACKOFF.pause_seconds(tries))
                # The leadership ends with this session: its loss must be noticed here.
                self._require_leadership()
                self._connection.execute("select")

    def _spare_workers(self, outage_seconds: float) -> None:
        """Give live workers time for a heartbeat before they are checked: they were cut off just as we were."""
        timeout_seconds = self._broker.heartbeat_timeout / 1_000
        if outage_seconds > timeout_seconds / 2:
            log.info("redis is back", after_seconds=round(outage_seconds, 1))
            self._next_reaping = max(self._next_reaping, time.monotonic() + timeout_seconds / 2)

    def _verify_redis(self) -> None:
        """Claim Redis for our epoch; if it or Postgres has lost anything, send it again."""
        self._ahead.wait()
        self._history.verify_redis(self._send_again)

    def _send_again(self) -> None:
        self._bundler.salt = self._history.salt
        self._standby.await_flush()  # for what leaders before us have published
        leases.end_leases(self._connection)
        self._replayer.forget_waves()
        found = recovery.bundles(
            self._connection, self._reader, self._bundler, self._routes, self._give_up, self._postponed.after
        )
        sent = self._broker.publish(self._epoch, found)
        self._instrumentation.republished(sent)
        if sent:
            log.warning("messages that were lost or dropped were sent again", messages=sent)

    def _check_redis(self) -> None:
        self._postponed.measured(self._history.check([(route.queue, route.handler) for route in self._routes]))

    # Once in a while -------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        self._next_tick = now + _TICK_SECONDS
        self._instrumentation.alive("leading")
        self._sequence.look()
        self._look_at_keys()
        self._record_checkpoint()
        self._unrouted.write(self._records)
        self._retry_while_unavailable(self._check_redis)
        for route in leases.with_waiting(self._connection, self._routes):
            leases.release_unblocked(self._connection, route, self._cursors[route.handler])
        self._send_retries()
        if now >= self._next_reaping:
            self._next_reaping = now + _REAP_SECONDS
            self._retry_while_unavailable(self._reap)
            self._retry_while_unavailable(self._resume_held)
        self._retry_while_unavailable(self._renamed_queues.step)
        if now >= self._next_freeing:
            self._next_freeing = now + _FREE_NOTIFICATIONS_SECONDS
            self._connection.execute("select pg_notification_queue_usage()")
        if self._leadership is not None and now >= self._next_foreign_locks:
            self._next_foreign_locks = now + _LOG_FOREIGN_LOCKS_SECONDS
            self._leadership.log_foreign_locks()
        if now >= self._next_partitions:
            self._next_partitions = now + _PARTITIONS_SECONDS
            if self._maintain is not None:
                self._maintain()

    def _reap(self) -> None:
        self._mend()
        self._instrumentation.reaped(self._broker.reap())

    def _mend(self) -> None:
        if self._broker.mend((route.queue, route.handler) for route in self._routes):
            self._history.distrust("keys of ours were overwritten by another program")

    def _look_at_keys(self) -> None:
        if self._keys.refresh():
            self._history.distrust("a key that messages were signed with was revoked")
        if self._bundler.key != self._keys.newest:
            self._bundler.key = self._keys.newest
            self._replayer.forget_waves()  # they are signed with the old key

    def _resume_held(self) -> None:
        """Give handlers that were resumed what was held for them, also what was just being held."""
        held = self._broker.with_held((route.queue, route.handler) for route in self._routes)
        if held:
            paused = pauses.paused_handlers(self._connection)
            for queue, handler in held:
                if handler not in paused:
                    self._broker.resume_held(queue, handler)

    def _send_retries(self) -> None:
        envelopes = self._reader.envelopes
        lease_seconds = self._settings.retry_lease_seconds
        routes = [route for route in self._routes if route.handler not in self._postponed.full]
        due = leases.lease_due(self._connection, envelopes.max_rows, lease_seconds, routes, envelopes.max_small_bytes)
        for part in envelopes.in_parts(due, [delivery.envelope for delivery in due]):
            self._give_up(
                [Unreadable(made.item.handler_name, made.item.position, made.problem) for made in part if made.problem]
            )
            self._send(partial(self._retries, part))
        self._instrumentation.retried(len(due))
        if due:
            self._wakeup.busy()
            # There may be more: after the next batch of live events, and without a pause.
            self._wakeup.heard.add("dovecote_deliveries")

    def _retries(self, part: Sequence[Made[DueDelivery]]) -> Iterator[QueuedBundle]:
        return self._bundler.retries(
            replace(made.item, envelope=made.envelope) for made in part if made.problem is None
        )

    def _give_up(self, rows: Sequence[Unreadable]) -> None:
        report({row.position: row.problem for row in rows})
        record_unreadable(self._connection, self._epoch, rows)

    # Sleeping --------------------------------------------------------------------------------

    def _gather(self, batch: Batch) -> None:
        # In traffic, wait for more events: each alone would be a message and a transaction of its own.
        if not batch.is_full:
            self._stop.sleep(self._settings.gather_ms / 1_000)

    def _sleep(self) -> None:
        """Sleep until woken or until the next poll; retries and the check for dead workers are not delayed."""
        pause = min(
            self._wakeup.next_poll_seconds(), self._replayer.seconds_until_due(), self._postponed.seconds_until_due()
        )
        look_again = time.monotonic() + pause
        while not self._wakeup.is_woken and time.monotonic() < look_again:
            self._wakeup.sleep(min(look_again, self._next_tick) - time.monotonic())
            if time.monotonic() >= self._next_tick:
                self._tick()
