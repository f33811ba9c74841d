"""What a leader knows about Redis, and whether Redis and Postgres still agree.

Either may go back in time: Redis by a restart or a flush, Postgres by a restore, a failover, or a crash with
asynchronous commits. Then one of them holds what the other has lost. So Redis keeps the *history* in which its messages
were sent, the *run* of Postgres whose relay sent them, and a *heartbeat*: a number that grows once a second while
messages are under way, in Postgres first, on disk, and in Redis second. The run shows nearly every loss, because
Postgres loses nothing within one run. The heartbeat covers machines that go back with their memory.

There is one cure for every disagreement. A new history begins, what is queued is dropped, and all that is published and
not processed is sent again, with other message ids than before: a consumer may acknowledge a message of the old history
at any time (tests/models/hand_over.pml).
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import blake2b
from uuid import uuid4

import structlog
from redis import RedisError

from dovecote.broker.publisher import Publisher, RedisUsage
from dovecote.errors import NewerRelay, RedisLost
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.fence import Claim, Fence, RedisFence
from dovecote.store import relay_state
from dovecote.store.envelopes import Connection
from dovecote.store.relay_state import MAX_AHEAD, TakenOver
from dovecote.store.runs import Run, server_run
from dovecote.telemetry.instrumentation import RelayInstrumentation

log = structlog.get_logger()

_HEARTBEAT_SECONDS = 1.0
# A leader sends a heartbeat to Redis once a second. One that was silent for so long does not lead any more.
_SILENT_MS = 10_000
_STAND_BACK_SECONDS = 1.0
_LOG_EVERY = 60
# Between two statements of a leader that is busy with Redis: Postgres ends an idle session.
_KEEP_ALIVE_SECONDS = 1.0


class StandsBack(NewerRelay):
    """A relay of a newer Postgres uses this Redis."""

    def __init__(self, ours: Run, theirs: Run) -> None:
        super().__init__(
            f"a relay of another database publishes to this Redis: {theirs}, and ours is {ours}; point this relay to "
            "the other database, or give it a Redis or a DOVECOTE_REDIS__NAMESPACE of its own"
        )


class OtherRun(NewerRelay):
    """Two sessions of one leadership are connected to different runs of Postgres."""


def known_redis(run_id: str, epoch: int) -> str:
    """Return what `relay_state` keeps of the Redis that holds what was published: its run id and its epoch."""
    return f"{run_id}@{epoch}"


def salt(history: str) -> bytes:
    """Return what makes the message ids of one history differ from those of another."""
    return blake2b(history.encode(), digest_size=blake2b.SALT_SIZE).digest() if history else b""


def require_right_of_way(run: str, seen: Fence) -> None:
    """Leave Redis to the relay of a newer database while that is alive.

    Otherwise two databases that were one would take turns for ever, and drop each other's messages each time.
    Errors: StandsBack.
    """
    ours, theirs = Run.read(run), Run.read(seen.instance)
    # Absolute: a clock that was set back must not block us for longer.
    is_alive = abs(seen.silent_ms) < _SILENT_MS
    if is_alive and ours and theirs and theirs.is_newer_than(ours):
        raise StandsBack(ours, theirs)


def await_right_of_way(
    connection: Connection, broker: Publisher, stop: StopFlag, instrumentation: RelayInstrumentation
) -> int:
    """Stand back, and log it, while a relay of a newer database uses this Redis. Return the epoch that Redis has seen.

    0 while Redis is away: `verify_redis` asks again. The session is kept, and its lock with it.
    Errors: StandsBack when stopped meanwhile.
    """
    run, redis_fence = server_run(connection), RedisFence(broker)
    tries = 0
    while True:
        try:
            seen = redis_fence.read()
        except RedisError:
            return 0
        try:
            require_right_of_way(run, seen)
        except StandsBack as reason:
            if stop.is_set():
                raise
            instrumentation.alive("standing_back")
            relay_state.stand_back(connection, seen.instance)
            if tries % _LOG_EVERY == 0:
                log.error("relay stands back", why=str(reason))
            tries += 1
            stop.sleep(_STAND_BACK_SECONDS)
        else:
            return seen.epoch


class History:
    """What the leader of one epoch knows about Redis.

    `connection` reads, `records` is the session that records what was published; both belong to one run of Postgres.
    With `sends_again`, what is published and not processed is sent again in any case.
    """

    def __init__(
        self,
        taken: TakenOver,
        *,
        connection: Connection,
        broker: Publisher,
        records: Connection | None = None,
        instrumentation: RelayInstrumentation | None = None,
        sends_again: bool = False,
    ) -> None:
        self._connection = connection
        self._records = records or connection
        self._instrumentation = instrumentation or RelayInstrumentation()
        self._broker = broker
        self._fence = RedisFence(broker)
        self.epoch = taken.epoch
        #: The Redis that holds what was published, as in relay_state. Nothing is known after another run of Postgres.
        self._known_redis = taken.known_redis if taken.instance == taken.run else None
        self._claim = Claim(taken.epoch, taken.history, taken.run, taken.heartbeat)
        # The leader before us may have died between the heartbeat in Postgres and the one in Redis.
        self._confirmed_heartbeat = taken.heartbeat - 1
        self._next_heartbeat = 0.0
        self._under_way = True
        self._sent = broker.sent
        self._sends_again = sends_again

    def require_one_run(self) -> None:
        """Errors: OtherRun: a later connection may reach another server, a standby that was just promoted."""
        if (found := server_run(self._records)) != self._claim.instance:
            raise OtherRun(f"one session is of run {self._claim.instance} of Postgres, and the next of {found}")

    @property
    def salt(self) -> bytes:
        return salt(self._claim.history)

    # The handshake ---------------------------------------------------------------------------

    def verify_redis(self, send_again: Callable[[], None]) -> None:
        """Claim Redis for this epoch. If it or Postgres is not in the recorded state, a new history begins.

        `send_again` puts on the queues what is published, not processed and not queued.
        Errors: NewerRelay, RedisLost, RedisError, those of `send_again`.
        """
        seen = self._fence.read()
        if not self._claims_as_known(seen.redis_run):
            # Until the last message is sent again, no Redis is recorded: a crash in between starts this over.
            self._instrumentation.alive("sending_again")
            self._sends_again = True
            self._begin(seen)
        self._known_redis = known_redis(seen.redis_run, self.epoch)
        self._confirmed_heartbeat = self._claim.heartbeat
        if self._sends_again:
            self._instrumentation.alive("sending_again")
            with self._heartbeats():
                send_again()
        relay_state.remember_redis(self._connection, self.epoch, self._known_redis)
        self._sends_again = False

    def _claims_as_known(self, redis_run: str) -> bool:
        """Claim this Redis if it is the recorded one, with the recorded fence, history and heartbeat.

        One script compares and claims: a flush in between, or the claim of a relay that woke up late, must not make an
        empty Redis look known (tests/models/hand_over.pml).
        """
        run, _, epoch = (self._known_redis or "").rpartition("@")
        if not (epoch.isascii() and epoch.isdecimal() and len(epoch) < 20):
            return False  # no relay has written this
        return run == redis_run and self._fence.claim(
            self._claim, over=self._claim.history, known_epoch=int(epoch), lowest_heartbeat=self._confirmed_heartbeat
        )

    def _begin(self, seen: Fence) -> None:
        """Drop what is in Redis and start a new history there: it may lack events, and have events that were lost."""
        require_right_of_way(self._claim.instance, seen)
        if self.epoch < seen.epoch <= self.epoch + MAX_AHEAD:
            raise NewerRelay(f"epoch {seen.epoch} has taken over from {self.epoch}")
        self._known_redis = None
        self._claim = replace(self._claim, history=uuid4().hex)
        relay_state.begin_history(self._connection, self.epoch, self._claim.history, self._claim.instance)
        if not self._fence.claim(self._claim, over=seen.history):
            raise RedisLost
        with self._heartbeats():
            dropped = self._keep_session_alive(self._fence.drop(self._claim))
        write_log = log.warning if seen.history else log.info
        write_log("a new history begins", history=self._claim.history, dropped=dropped, epoch=self.epoch)

    def send_heartbeat(self) -> None:
        """Show in Redis that this leader is alive, or a relay of an older Postgres would no longer stand back."""
        with suppress(RedisError):
            self._fence.heartbeat(self._claim, self._confirmed_heartbeat)

    @contextmanager
    def _heartbeats(self) -> Iterator[None]:
        """Send heartbeats from a thread: the search for what is lost takes longer than a second."""
        done = threading.Event()

        def send() -> None:
            while not done.wait(_HEARTBEAT_SECONDS):
                self.send_heartbeat()

        thread = threading.Thread(target=send, name="heartbeats", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _keep_session_alive(self, calls: Iterable[int]) -> int:
        total, next_at = 0, time.monotonic() + _KEEP_ALIVE_SECONDS
        for number in calls:
            total += number
            if time.monotonic() >= next_at:
                next_at = time.monotonic() + _KEEP_ALIVE_SECONDS
                self._instrumentation.alive("sending_again")
                self._connection.execute("select")
        return total

    def distrust(self, why: str) -> None:
        """Make the next check fail: a new history begins, and what is queued is sent again."""
        log.warning("what is queued is dropped and sent again", why=why)
        self._known_redis = None

    # Once a second ---------------------------------------------------------------------------

    def check(self, handlers: Sequence[tuple[str, str]]) -> RedisUsage:
        """Return what Redis holds for these (queue, handler), if it is in the state that we left.

        Errors: RedisLost, NewerRelay.
        """
        self._move_heartbeat()
        if self._known_redis is None or not self._fence.heartbeat(self._claim, self._confirmed_heartbeat):
            raise RedisLost
        self._confirmed_heartbeat = self._claim.heartbeat
        run, usage = self._broker.look(handlers)
        # What is queued may be acknowledged from now on, and an acknowledgement may be lost.
        self._under_way = self._under_way or usage.under_way
        if known_redis(run, self.epoch) != self._known_redis:
            raise RedisLost
        return usage

    def _move_heartbeat(self) -> None:
        """Raise the heartbeat in Postgres, on disk, before Redis gets it: once a second at most, and only if needed."""
        now = time.monotonic()
        if now < self._next_heartbeat or not (self._under_way or self._broker.sent != self._sent):
            return
        # From our own memory, never read again: Postgres may have gone back since.
        heartbeat = self._claim.heartbeat + 1
        relay_state.record_heartbeat(self._records, self.epoch, heartbeat)
        self._claim = replace(self._claim, heartbeat=heartbeat)
        self._next_heartbeat = now + _HEARTBEAT_SECONDS
        self._under_way, self._sent = False, self._broker.sent
