"""One relay process: wait for leadership, lead, and start over when a connection is lost.

One relay leads; others stand by (dovecote/relay/leader_lock.py). Every error of the connection ends the
leadership: all that the next leader starts from is in Postgres.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import structlog
from redis import RedisError

from dovecote.broker.broker import OutboxBroker
from dovecote.envelope.signatures import NoMessageKey
from dovecote.errors import DovecoteError, NewerRelay, RedisLost
from dovecote.migrations import schema
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.history import History, StandsBack, await_right_of_way, take_over
from dovecote.relay.leader import Leader
from dovecote.relay.leader_lock import LeaderLock
from dovecote.relay.low_water_marks import Marks
from dovecote.relay.reconciler import Reconciler
from dovecote.relay.standby_flush import NotOnStandby
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.store import sequence
from dovecote.store.connections import (
    KEEPALIVES,
    NO_TIME_LIMITS,
    ONLY_OUR_NAMES,
    SESSION_SETTINGS,
    connection_parameters,
    set_newer,
)
from dovecote.store.loaders import load_anything
from dovecote.store.reader import Connection, Reader
from dovecote.store.sequence import SequenceFault
from dovecote.telemetry.failures import is_conflict, is_transient
from dovecote.telemetry.instrumentation import RelayInstrumentation, RelayState

log = structlog.get_logger()

# Of a new handler is what is not published yet: all above the checkpoint but for exactly what is in a batch. A
# version of a fact that the handler wants already is wanted since then: it may have been written before we knew it.
_SUBSCRIBE = """
    with published (above) as (
        select coalesce(range_agg(positions), '{}') * int8multirange(int8range(%(checkpoint)s, null, '()'))
        from dovecote.published_batches
        where positions && int8multirange(int8range(%(checkpoint)s, null, '()'))
          and not lower_inf(positions) and not upper_inf(positions)
    )
    insert into dovecote.subscriptions (handler_name, event_type, since_position, published_above, routed_epoch,
                                        replayable, ordered)
    select wanted.handler_name, wanted.event_type, coalesce(before.since_position, %(checkpoint)s),
           coalesce(before.published_above, published.above), %(epoch)s, wanted.replayable, wanted.ordered
    from unnest(%(handlers)s::text[], %(event_types)s::text[], %(replayable)s::boolean[], %(ordered)s::boolean[])
        as wanted (handler_name, event_type, replayable, ordered)
    cross join published
    left join lateral (
        select s.since_position, s.published_above from dovecote.subscriptions s
        where s.handler_name = wanted.handler_name
          and dovecote.fact_of(s.event_type) = dovecote.fact_of(wanted.event_type)
        order by s.since_position limit 1
    ) before on true
    on conflict (handler_name, event_type) do update
    set routed_epoch = excluded.routed_epoch, replayable = excluded.replayable, ordered = excluded.ordered
"""
# Something we route was not routed by the leader before us, who knew less: it has passed over events of ours.
_PASSED_OVER = """
    select exists (
        select from unnest(%(handlers)s::text[], %(event_types)s::text[]) as wanted (handler_name, event_type)
        join dovecote.subscriptions known on known.handler_name = wanted.handler_name
            and dovecote.fact_of(known.event_type) = dovecote.fact_of(wanted.event_type)
        left join dovecote.subscriptions own on own.handler_name = wanted.handler_name
            and own.event_type = wanted.event_type
        where own.routed_epoch is distinct from %(epoch)s - 1
    )
"""
_FORGET_REDIS = "update dovecote.relay_state set redis_run_id = null where epoch = %(epoch)s"


_SESSION_SETTINGS = {
    **SESSION_SETTINGS,
    **NO_TIME_LIMITS,
    **ONLY_OUR_NAMES,
    "statement_timeout": 0,
    "default_transaction_isolation": "read committed",
    # What the relay records may be lost in a crash of Postgres: it then publishes again, and consumers absorb it.
    "synchronous_commit": "off",
    # The plan is guarded: positions are read by index, whatever the statistics say.
    "jit": "off",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_sort": "off",
    "enable_indexscan": "on",
}

# A notification through one server takes a millisecond or two.
_HEARD_WITHIN_SECONDS = 5.0


def of_a_value(error: psycopg.Error) -> bool:
    """Return whether Postgres could not work with a value in a row, such as a number that would be too large."""
    return isinstance(error, psycopg.DataError)


def _state_after(error: Exception) -> RelayState:
    if isinstance(error, StandsBack):
        return "standing_back"
    return "waiting_for_postgres" if isinstance(error, psycopg.Error) else "waiting_for_redis"


class NoSession(DovecoteError):
    """Something between the relay and Postgres gives each statement to whichever session is free."""

    def __init__(self) -> None:
        super().__init__(
            "DATABASE_URL leads through a proxy that pools transactions: LISTEN and session locks do not work "
            "there, and the relay needs both; give it a URL that leads to Postgres itself, or a session pool"
        )


def _revision(connection: Connection) -> str | None:
    """Return the schema's revision; None while it is one that does not show it yet."""
    try:
        (revision,) = connection.execute(schema.REVISION).fetchone() or (None,)
    except psycopg.errors.InsufficientPrivilege:
        return None
    return None if revision is None else str(revision)


class Relay:
    """Leads or stands by until `stop` is called, from a signal handler or another thread."""

    def __init__(
        self,
        settings: Settings,
        broker: OutboxBroker,
        routes: Sequence[Route],
        instrumentation: RelayInstrumentation | None = None,
        maintain: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._instrumentation = instrumentation or RelayInstrumentation()
        self._broker = broker
        self._routes = routes
        self._stop = StopFlag()
        self._maintain = maintain
        self._schema_is_current = False
        self._refused: str | None = None
        schema.revisions()  # read before a leadership hangs on it

    def stop(self) -> None:
        """End after the batch at hand."""
        self._stop.set()

    def run(self) -> None:
        """Return after `stop`; survive the loss of either server until then.

        Errors: psycopg.Error for trouble that does not pass, such as a schema that was never migrated;
                NoSession.
        """
        tries = 0
        while not self._stop.is_set():
            try:
                with self._session() as connection:
                    self._require_session(connection)
                    self._await_schema(connection)
                    with LeaderLock(
                        self._session, connection, self._stop, self._settings.relay.leader_timeout_seconds
                    ) as leadership:
                        if self._becomes_leader(connection, leadership):
                            tries = 0
                            self._lead(connection, leadership)
            except (SequenceFault, NotOnStandby) as error:
                log.error("relay stops leading", error=str(error))
            except (psycopg.Error, RedisError, NewerRelay, RedisLost, NoMessageKey) as error:
                if isinstance(error, psycopg.Error) and not (
                    is_transient(error) or is_conflict(error) or of_a_value(error)
                ):
                    raise
                tries += 1
                self._instrumentation.alive(_state_after(error))
                if tries in (1, 10) or tries % 100 == 0:
                    what = "waiting for postgres" if isinstance(error, psycopg.Error) else "relay starts over"
                    log.warning(what, tries=tries, error=f"{type(error).__name__}: {error}")
                self._stop.sleep(min(2.0, 0.05 * 2 ** min(tries, 8)))
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                # Something that was read is not as we write it. It may be mended meanwhile, and ends no process.
                tries += 1
                self._instrumentation.alive("starting")
                log.exception("relay cannot go on with what it has read", tries=tries, error=type(error).__name__)
                self._stop.sleep(min(30.0, 0.5 * 2 ** min(tries, 8)))

    @contextmanager
    def _session(self) -> Iterator[Connection]:
        database = self._settings.database
        parameters = connection_parameters(
            database.url.get_secret_value(),
            _SESSION_SETTINGS,
            connect_timeout=database.connect_timeout_seconds,
            application_name="dovecote relay",
            **KEEPALIVES,
        )
        with psycopg.connect(autocommit=True, **parameters) as connection:
            set_newer(connection, _SESSION_SETTINGS)
            load_anything(connection)
            yield connection

    def _require_session(self, connection: Connection) -> None:
        """Listen here and ring from another connection: only a session of our own hears it."""
        channel = f"dovecote_{uuid4().hex}"
        connection.execute(f"listen {channel}")
        with self._session() as another:
            try:
                another.execute(f"notify {channel}")
            except psycopg.errors.ProgramLimitExceeded as error:
                # Full for now, because of somebody else. We poll, as for all that was written meanwhile.
                log.warning("NOTIFY fails, so it is not known whether we would hear it", error=str(error))
                connection.execute(f"unlisten {channel}")
                return
        # A list: the generator holds the connection's lock until it has come to its end.
        heard = [
            notification.channel for notification in connection.notifies(timeout=_HEARD_WITHIN_SECONDS, stop_after=1)
        ]
        if channel not in heard:
            raise NoSession
        connection.execute(f"unlisten {channel}")

    def _await_schema(self, connection: Connection) -> None:
        """Stand back while the schema is older than this code: relays from before the deploy go on meanwhile."""
        if self._schema_is_current:
            return
        tries = 0
        while not self._stop.is_set() and (pending := schema.pending_for(_revision(connection))):
            if tries % 60 == 0:
                log.warning(schema.WAITING, newest=pending[-1])
            tries += 1
            self._instrumentation.alive("waiting_for_schema")
            self._stop.sleep(1.0)
        self._schema_is_current = not self._stop.is_set()

    def _becomes_leader(self, connection: Connection, leadership: LeaderLock) -> bool:
        stood_by = False
        frozen_after = self._settings.relay.leader_timeout_seconds
        next_look = time.monotonic() + frozen_after
        while not self._stop.is_set():
            if self._refused and (fault := sequence.fault(connection)):
                self._refuse(fault)  # without the lock, or it would look now and then as if somebody led
                continue
            if leadership.try_take():
                if self._may_lead(connection, leadership):
                    return True
                continue
            self._instrumentation.alive("standing_by")
            if not stood_by:
                stood_by = True
                log.info("relay stands by")
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + frozen_after / 5
                leadership.end_frozen_older()
            # Asked anew each time: a statement that waits would hold back vacuum for as long as it waits.
            self._stop.sleep(self._settings.relay.standby_interval_seconds)
        return False

    def _may_lead(self, connection: Connection, leadership: LeaderLock) -> bool:
        """Let the lock go again where the sequence would hide events, and be silent for a while.

        The process stays: it would be started again and again, and leads by itself once the sequence is repaired.
        """
        if (fault := sequence.refusal(connection)) is None:
            self._refused = None
            return True
        leadership.give_back()
        self._refuse(fault)
        return False

    def _refuse(self, fault: str) -> None:
        self._instrumentation.alive("refuses")
        if self._refused != fault:
            self._refused = fault
            log.error("relay refuses to lead", fault=fault)
        self._stop.sleep(sequence.ASK_AGAIN_SECONDS)

    def _lead(self, connection: Connection, leadership: LeaderLock) -> None:
        leadership.begin()
        past = await_right_of_way(connection, self._broker, self._stop, self._instrumentation)
        taken = take_over(connection, past, f"{socket.gethostname()}:{os.getpid()}")
        epoch = taken.epoch
        limits = self._settings.relay
        reader = Reader(connection, taken.checkpoint, limits.batch_size, limits.batch_bytes)
        passed_over = self._subscribe(connection, epoch, taken.checkpoint)
        log.info("relay leads", epoch=epoch, checkpoint=taken.checkpoint)
        with self._session() as records:
            history = History(
                taken,
                connection=connection,
                records=records,
                broker=self._broker,
                instrumentation=self._instrumentation,
                passed_over=passed_over,
            )
            history.require_one_run()
            leader = Leader(
                connection=connection,
                reader=reader,
                broker=self._broker,
                routes=self._routes,
                settings=self._settings.relay,
                stop=self._stop,
                history=history,
                maintain=self._maintain,
                records=records,
                leadership=leadership,
                instrumentation=self._instrumentation,
            )
            reconciler = Reconciler(
                connect=self._session,
                broker=self._broker,
                bundler=leader.bundler,
                routes=self._routes,
                settings=self._settings.relay,
                epoch=epoch,
                published_upto=lambda: leader.published_upto,
                instrumentation=self._instrumentation,
            )
            with Marks(self._session, epoch, lambda: leader.published_upto), reconciler:
                leader.lead()
        log.info("relay stopped", epoch=epoch, checkpoint=leader.checkpoint)

    def _subscribe(self, connection: Connection, epoch: int, checkpoint: int) -> bool:
        """Note since when each handler wants each type; what is noted already stays.

        Return whether leaders before us may have passed over events that are wanted.
        """
        wanted = [(route, event_type) for route in self._routes for event_type in route.event_types]
        parameters = {
            "epoch": epoch,
            "checkpoint": checkpoint,
            "handlers": [route.handler for route, _ in wanted],
            "event_types": [event_type for _, event_type in wanted],
            "replayable": [route.replayable for route, _ in wanted],
            "ordered": [route.ordered for route, _ in wanted],
        }
        with connection.transaction():
            (passed_over,) = connection.execute(_PASSED_OVER, parameters).fetchone() or (False,)
            connection.execute(_SUBSCRIBE, parameters)
            if passed_over:
                connection.execute(_FORGET_REDIS, parameters)
        return bool(passed_over)
