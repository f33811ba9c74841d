"""One relay process: wait for leadership, lead, and start over when a connection is lost.

One relay leads; others stand by (dovecote/relay/leader_lock.py). Every error of the connection ends the
leadership: all that the next leader starts from is in Postgres.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
import structlog
from redis import RedisError

from dovecote.broker.publisher import Publisher
from dovecote.envelope.signatures import NoMessageKey
from dovecote.errors import DovecoteError, NewerRelay, RedisLost
from dovecote.migrations import revisions
from dovecote.migrations.waiting import WAITING
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.history import History, StandsBack, await_right_of_way
from dovecote.relay.leader import Leader
from dovecote.relay.leader_lock import LeaderLock
from dovecote.relay.low_water_marks import LowWaterMarks
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
    hears_notifications,
    set_newer,
)
from dovecote.store.loaders import load_anything
from dovecote.store.reader import Connection, Reader
from dovecote.store.relay_state import take_over
from dovecote.store.sequence import SequenceFault
from dovecote.store.subscriptions import subscribe
from dovecote.telemetry.failures import is_conflict, is_transient
from dovecote.telemetry.instrumentation import RelayInstrumentation, RelayState
from dovecote.unit_of_work.backoff import Backoff

log = structlog.get_logger()

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

_BACKOFF = Backoff(first_seconds=0.1, max_seconds=2.0)
# After data that cannot be processed, which only a repair changes.
_SLOW_BACKOFF = Backoff(first_seconds=1.0, max_seconds=30.0)

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
    """A pool between the relay and Postgres runs each statement in any free session."""

    def __init__(self) -> None:
        super().__init__(
            "DATABASE_URL leads through a proxy that pools transactions: LISTEN and session locks do not work "
            "there, and the relay needs both; give it a URL that leads to Postgres itself, or a session pool"
        )


def _applied(connection: Connection) -> list[str] | None:
    """Return the heads in the version table; None before the first revision, which grants the right to look."""
    try:
        applied: list[str] | None
        (applied,) = connection.execute(revisions.HEADS).fetchone() or (None,)
    except psycopg.errors.InsufficientPrivilege:
        return None
    return applied


class Relay:
    """Leads or stands by until `stop` is called, from a signal handler or another thread."""

    def __init__(
        self,
        settings: Settings,
        broker: Publisher,
        routes: Sequence[Route],
        instrumentation: RelayInstrumentation | None = None,
        maintain: Callable[[], None] | None = None,
        migration_locations: Sequence[Path] = (),
    ) -> None:
        self._settings = settings
        self._instrumentation = instrumentation or RelayInstrumentation()
        self._broker = broker
        self._routes = routes
        self._stop = StopFlag()
        self._maintain = maintain
        self._schema_is_current = False
        self._refused: str | None = None
        self._locations = migration_locations

    def stop(self) -> None:
        """End after the current batch."""
        self._stop.set()

    def run(self) -> None:
        """Return after `stop`; survive the loss of either server until then.

        Errors: psycopg.Error that is not transient, such as for a schema that was never migrated;
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
                if _BACKOFF.should_log(tries):
                    what = "waiting for postgres" if isinstance(error, psycopg.Error) else "relay starts over"
                    log.warning(what, tries=tries, error=f"{type(error).__name__}: {error}")
                self._stop.sleep(_BACKOFF.pause_seconds(tries))
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                # Data that no relay writes. It may be repaired meanwhile; the process goes on.
                tries += 1
                self._instrumentation.alive("starting")
                log.exception("relay cannot process what it has read", tries=tries, error=type(error).__name__)
                self._stop.sleep(_SLOW_BACKOFF.pause_seconds(tries))

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
        """Errors: NoSession where a notification from another connection is not heard on this one."""
        with self._session() as another:
            try:
                is_heard = hears_notifications(connection, another, _HEARD_WITHIN_SECONDS)
            except psycopg.errors.ProgramLimitExceeded as error:
                # Another program has filled Postgres's queue of notifications. We poll, as for all written meanwhile.
                log.warning("NOTIFY fails, so it is not known whether we would hear it", error=str(error))
                return
        if not is_heard:
            raise NoSession

    def _await_schema(self, connection: Connection) -> None:
        """Wait while the schema is older than this code: relays from before the deploy go on meanwhile."""
        if self._schema_is_current:
            return
        tries = 0
        while not self._stop.is_set() and (
            pending := revisions.pending_for(_applied(connection), locations=self._locations)
        ):
            if tries % 60 == 0:
                log.warning(WAITING, newest=pending[-1])
            tries += 1
            self._instrumentation.alive("waiting_for_schema")
            self._stop.sleep(1.0)
        self._schema_is_current = not self._stop.is_set()

    def _becomes_leader(self, connection: Connection, leadership: LeaderLock) -> bool:
        stood_by = False
        while not self._stop.is_set():
            if self._refused and (fault := sequence.fault(connection)):
                self._refuse(fault)  # without the lock, or `status` would now and then show a leader
                continue
            if leadership.try_take():
                if self._may_lead(connection, leadership):
                    return True
                continue
            self._instrumentation.alive("standing_by")
            if not stood_by:
                stood_by = True
                log.info("relay stands by")
            # Polled: a statement that waits for the lock would hold back vacuum.
            self._stop.sleep(self._settings.relay.standby_interval_seconds)
        return False

    def _may_lead(self, connection: Connection, leadership: LeaderLock) -> bool:
        """Release the lock if the sequence would hide events, and wait.

        The process stays: it would only be restarted again and again, and it leads once the sequence is repaired.
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
        were_skipped = subscribe(connection, self._routes, epoch, taken.checkpoint)
        log.info("relay leads", epoch=epoch, checkpoint=taken.checkpoint)
        with self._session() as records:
            history = History(
                taken,
                connection=connection,
                records=records,
                broker=self._broker,
                instrumentation=self._instrumentation,
                sends_again=were_skipped,
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
            with LowWaterMarks(self._session, epoch, lambda: leader.published_upto), reconciler:
                leader.lead()
        log.info("relay stopped", epoch=epoch, checkpoint=leader.checkpoint)
