"""What a leadership knows of Redis, and whether Redis and Postgres still tell the same story.

Either may go back: Redis by a restart or a flush, Postgres by a restore, a failover, a crash with asynchronous commits.
One then holds what the other has forgotten. So Redis keeps in which *history* it was told what it holds, by a relay of
which *run* of Postgres, and a *beat*: a number that moves once a second while messages are under way, in Postgres
first, on disk, and in Redis second. The run tells nearly all: Postgres forgets only with another run. The beat is the
net below it, for machines that go back with their memory.

Whatever is not as it was left, there is one cure. A new history begins, what is queued is dropped, and all that is
published and not processed is sent again, with other message ids than before: a consumer may acknowledge a message of
the old history at any time (tests/models/hand_over.pml).
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from uuid import uuid4

import structlog
from redis import RedisError

from dovecote.broker.broker import OutboxBroker, RedisUsage
from dovecote.errors import NewerRelay, RedisLost
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.fence import Claim, Marker, RedisFence
from dovecote.store.reader import Connection
from dovecote.store.runs import Run, server_run
from dovecote.telemetry.instrumentation import RelayInstrumentation

log = structlog.get_logger()

_BEAT_SECONDS = 1.0
# So far may an epoch in Redis be ahead of that in Postgres; see lua/claim.lua.
MAX_AHEAD = 1_000_000
# A relay says something to Redis once a second. One that was silent for so long does not lead any more.
_SILENT_MS = 10_000
_STAND_BACK_SECONDS = 1.0
_TOLD_AGAIN_AFTER = 60
# Between two statements of a leader that is busy with Redis: Postgres ends the session of one that says nothing.
_SIGN_OF_LIFE_SECONDS = 1.0

# Past every epoch that either server has heard of: Postgres may have been taken back by many leaderships. Where the
# leader before us was a relay that did not sign, nothing that it has queued is acted on: then no Redis is known. An
# epoch of Redis that is far ahead was made up (lua/claim.lua).
_TAKE_OVER = f"""
    update dovecote.relay_state as state
    set epoch = greatest(state.epoch, before.past) + 1, owner = %(owner)s, owned_since = clock_timestamp(),
        seen_at = clock_timestamp(), stands_back_for = null, signed_epoch = greatest(state.epoch, before.past) + 1,
        redis_run_id = case when before.signed_epoch = before.epoch then state.redis_run_id end
    from (select epoch, signed_epoch, case when %(past)s <= epoch + {MAX_AHEAD} then %(past)s else 0 end as past
          from dovecote.relay_state for no key update) as before
    returning state.epoch, checkpoint, redis_run_id, coalesce(history, ''), coalesce(instance, '')
"""  # noqa: S608 - put together from constants
# A statement after the take-over: from then on no earlier epoch moves it.
_LAST_BEAT = "select last_value from dovecote.relay_beat"
_STAND_BACK = "update dovecote.relay_state set stands_back_for = %s where stands_back_for is distinct from %s"
# What Redis is told next must not be forgotten; batches may be, with what the same crash forgets. It is flushed here
# only: a failover to a standby that has less is another run, and a standby that is away must not hold the leader up.
_DURABLY = "set_config('synchronous_commit', 'local', true)"
_BEGIN = f"""
    update dovecote.relay_state set history = %s, instance = %s, redis_run_id = null where epoch = %s
    returning {_DURABLY}
"""  # noqa: S608 - put together from constants
_KNOWN = f"update dovecote.relay_state set redis_run_id = %s where epoch = %s returning {_DURABLY}"  # noqa: S608 - as above
# The row is locked and not written, as for a batch (leading.py). With a transaction id, so the commit is flushed.
_BEAT = f"""
    select setval('dovecote.relay_beat', %s), {_DURABLY}
    from (select from dovecote.relay_state where epoch = %s for no key update) as owner
"""  # noqa: S608 - as above


class StandsBack(NewerRelay):
    """A relay of a newer Postgres uses this Redis."""

    def __init__(self, ours: Run, theirs: Run) -> None:
        super().__init__(
            f"a relay of another database publishes to this Redis: {theirs}, and ours is {ours}; point this relay to "
            "the other database, or give it a Redis or a DOVECOTE_REDIS__NAMESPACE of its own"
        )


class OtherRun(NewerRelay):
    """Two sessions of one leadership lead to different runs of Postgres."""


@dataclass(frozen=True)
class TakenOver:
    """What a new leader starts from.

    known_redis       `<run id>@<epoch>` of the Redis that holds what was published, None for none
    history, instance in which, and of which run of Postgres, it was told so; empty for none
    run, beat         this run, and the beat it knows
    """

    epoch: int
    checkpoint: int = 0
    known_redis: str | None = None
    history: str = ""
    instance: str = ""
    run: str = ""
    beat: int = 0


def known_redis(run_id: str, epoch: int) -> str:
    """Return what `relay_state` keeps of the Redis that holds what was published: its run id, and the epoch in it."""
    return f"{run_id}@{epoch}"


def salt(history: str) -> bytes:
    """Return what goes into the ids of a history's messages."""
    return blake2b(history.encode(), digest_size=blake2b.SALT_SIZE).digest() if history else b""


def take_over(connection: Connection, past: int, owner: str) -> TakenOver:
    """Begin the next epoch, past the one that Redis has heard of."""
    row = connection.execute(_TAKE_OVER, {"past": past, "owner": owner}).fetchone()
    assert row is not None, "relay_state has one row"
    (beat,) = connection.execute(_LAST_BEAT).fetchone() or (0,)
    epoch, checkpoint, known, history, instance = row
    return TakenOver(epoch, checkpoint, known, history, instance, server_run(connection), beat)


def require_right_of_way(run: str, seen: Marker) -> None:
    """Let the relay of a newer database have this Redis while it lives.

    Otherwise two that were one would take turns for ever, and drop each other's messages each time.
    Errors: StandsBack.
    """
    ours, theirs = Run.read(run), Run.read(seen.instance)
    # Not less than zero: a clock that was set back must not keep us from our work for longer.
    lives = abs(seen.silent_ms) < _SILENT_MS
    if lives and ours and theirs and theirs.is_newer_than(ours):
        raise StandsBack(ours, theirs)


def await_right_of_way(
    connection: Connection, broker: OutboxBroker, stop: StopFlag, instrumentation: RelayInstrumentation
) -> int:
    """Stand back, loudly, while a relay of a newer database uses this Redis. Return the epoch that Redis has heard of.

    0 while Redis is away: it is asked again when it is greeted. The session is kept, and its lock with it.
    Errors: StandsBack when told to stop meanwhile.
    """
    run, marker = server_run(connection), RedisFence(broker)
    tries = 0
    while True:
        try:
            seen = marker.read()
        except RedisError:
            return 0
        try:
            require_right_of_way(run, seen)
        except StandsBack as reason:
            if stop.is_set():
                raise
            instrumentation.alive("standing_back")
            connection.execute(_STAND_BACK, (seen.instance, seen.instance))
            if tries % _TOLD_AGAIN_AFTER == 0:
                log.error("relay stands back", why=str(reason))
            tries += 1
            stop.sleep(_STAND_BACK_SECONDS)
        else:
            return seen.epoch


class History:
    """What the leader of one epoch knows of Redis.

    `connection` reads, `records` is the session that records what was published; both are of one run of Postgres.
    `passed_over` says that what is published and not processed is to be sent again in any case.
    """

    def __init__(
        self,
        taken: TakenOver,
        *,
        connection: Connection,
        broker: OutboxBroker,
        records: Connection | None = None,
        instrumentation: RelayInstrumentation | None = None,
        passed_over: bool = False,
    ) -> None:
        self._connection = connection
        self._records = records or connection
        self._instrumentation = instrumentation or RelayInstrumentation()
        self._broker = broker
        self._marker = RedisFence(broker)
        self.epoch = taken.epoch
        #: The Redis that holds what was published, as in relay_state. Nothing is known after another run of Postgres.
        self._known_redis = taken.known_redis if taken.instance == taken.run else None
        self._claim = Claim(taken.epoch, taken.history, taken.run, taken.beat)
        # The leader before us may have died between telling Postgres and telling Redis.
        self._confirmed_beat = taken.beat - 1
        self._next_beat = 0.0
        self._under_way = True
        self._sent = broker.sent
        self._sends_again = passed_over

    def require_one_run(self) -> None:
        """Errors: OtherRun: a connection made later may lead elsewhere, to a standby that was just promoted."""
        if (found := server_run(self._records)) != self._claim.instance:
            raise OtherRun(f"one session leads to run {self._claim.instance} of Postgres, and the next to {found}")

    @property
    def salt(self) -> bytes:
        return salt(self._claim.history)

    # Greeting --------------------------------------------------------------------------------

    def verify_redis(self, send_again: Callable[[], None]) -> None:
        """Claim Redis for this epoch. If it or Postgres is not as it was left, a new history begins.

        `send_again` puts on the queues what is published, not processed and not queued.
        Errors: NewerRelay, RedisLost, RedisError, those of `send_again`.
        """
        seen = self._marker.read()
        if not self._claims_as_known(seen.redis_run):
            # Until the last message is sent again, Postgres knows no Redis: a crash in between starts this over.
            self._instrumentation.alive("sending_again")
            self._sends_again = True
            self._begin(seen)
        self._known_redis = known_redis(seen.redis_run, self.epoch)
        self._confirmed_beat = self._claim.beat
        if self._sends_again:
            self._instrumentation.alive("sending_again")
            with self._alive():
                send_again()
        self._execute(self._connection, _KNOWN, (self._known_redis, self.epoch))
        self._sends_again = False

    def _claims_as_known(self, redis_run: str) -> bool:
        """Claim where this is the Redis that was recorded, with the marker, history and beat that were recorded.

        They are compared where the marker is set: a flush in between, or the claim of a relay that woke up late,
        must not make an empty Redis look known (tests/models/hand_over.pml).
        """
        run, _, epoch = (self._known_redis or "").rpartition("@")
        if not (epoch.isascii() and epoch.isdecimal() and len(epoch) < 20):
            return False  # written by no relay
        return run == redis_run and self._marker.claim(
            self._claim, over=self._claim.history, known_epoch=int(epoch), lowest_beat=self._confirmed_beat
        )

    def _begin(self, seen: Marker) -> None:
        """Trust nothing in Redis: neither that it has all, nor that what it has did happen."""
        require_right_of_way(self._claim.instance, seen)
        if self.epoch < seen.epoch <= self.epoch + MAX_AHEAD:
            raise NewerRelay(f"epoch {seen.epoch} has taken over from {self.epoch}")
        self._known_redis = None
        self._claim = replace(self._claim, history=uuid4().hex)
        self._execute(self._connection, _BEGIN, (self._claim.history, self._claim.instance, self.epoch))
        if not self._marker.claim(self._claim, over=seen.history):
            raise RedisLost
        with self._alive():
            dropped = self._say_something_during(self._marker.drop(self._claim))
        tell = log.warning if seen.history else log.info
        tell("a new history begins", history=self._claim.history, dropped=dropped, epoch=self.epoch)

    def tell_alive(self) -> None:
        """Tell Redis that this leader is alive, or a relay of an older Postgres would no longer stand back."""
        with suppress(RedisError):
            self._marker.beat(self._claim, self._confirmed_beat)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Tell it once a second, from a thread: the search for what is lost is silent for longer."""
        done = threading.Event()

        def tell() -> None:
            while not done.wait(_BEAT_SECONDS):
                self.tell_alive()

        thread = threading.Thread(target=tell, name="alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _say_something_during(self, calls: Iterable[int]) -> int:
        total, say_at = 0, time.monotonic() + _SIGN_OF_LIFE_SECONDS
        for number in calls:
            total += number
            if time.monotonic() >= say_at:
                say_at = time.monotonic() + _SIGN_OF_LIFE_SECONDS
                self._instrumentation.alive("sending_again")
                self._connection.execute("select")
        return total

    def distrust(self, why: str) -> None:
        """Have the next check find this Redis unknown: a new history begins, and what is queued is sent anew."""
        log.warning("what is queued is dropped and sent again", why=why)
        self._known_redis = None

    # Once a second ---------------------------------------------------------------------------

    def check(self, handlers: Sequence[tuple[str, str]]) -> RedisUsage:
        """Return what Redis holds for these (queue, handler), if it is as we left it. Errors: RedisLost, NewerRelay."""
        self._move_beat()
        if self._known_redis is None or not self._marker.beat(self._claim, self._confirmed_beat):
            raise RedisLost
        self._confirmed_beat = self._claim.beat
        run, usage = self._broker.look(handlers)
        # What is queued may be acted on and acknowledged from now on, and be forgotten.
        self._under_way = self._under_way or usage.under_way
        if known_redis(run, self.epoch) != self._known_redis:
            raise RedisLost
        return usage

    def _move_beat(self) -> None:
        """Move on in Postgres, on disk, before Redis is told: at most once a second, and not for nothing."""
        now = time.monotonic()
        if now < self._next_beat or not (self._under_way or self._broker.sent != self._sent):
            return
        # Never lower than the last one, and never asked again: Postgres may have gone back since.
        beat = self._claim.beat + 1
        self._execute(self._records, _BEAT, (beat, self.epoch))
        self._claim = replace(self._claim, beat=beat)
        self._next_beat = now + _BEAT_SECONDS
        self._under_way, self._sent = False, self._broker.sent

    def _execute(self, connection: Connection, statement: str, parameters: tuple[object, ...]) -> None:
        if connection.execute(statement, parameters).rowcount != 1:
            raise NewerRelay(f"epoch {self.epoch} is over")
