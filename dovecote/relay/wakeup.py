"""Who wakes the relay, and when it may sleep.

The relay sleeps only while it holds the wake-up lock. A writer that finds the lock taken sends a notification with its
commit; one that finds it free sends none: the relay is awake and will read what it wrote (docs/adr/0005-the-bell.md).
A writer that saw the relay awake and commits once it sleeps says nothing: such writers are known by their transactions,
and the relay looks again until they are over (docs/adr/0027-held-writers-and-snapshots.md).
"""

import time

import psycopg

from dovecote.processes.stop_flag import StopFlag
from dovecote.settings import Relay as RelaySettings
from dovecote.store import pauses, replays
from dovecote.store.gaps import active_writers
from dovecote.store.reader import Connection
from dovecote.telemetry.instrumentation import RelayInstrumentation

_CHANNELS = ("dovecote_outbox", "dovecote_deliveries", replays.CHANNEL, pauses.CHANNEL)

# What a transaction that saw us awake may wait after its end, as a share of what it took.
_SHARE_OF_A_TRANSACTION = 1 / 8

# Of a second. Each event of a quiet stream brings one or two such wake-ups along, and a pause would delay the next one.
_MAX_IDLE_WAKEUPS = 100


class Wakeup:
    """What has called the leading relay, and the lock that tells writers that it sleeps."""

    def __init__(
        self, connection: Connection, stop: StopFlag, settings: RelaySettings, instrumentation: RelayInstrumentation
    ) -> None:
        self._connection = connection
        self._stop = stop
        self._settings = settings
        self._instrumentation = instrumentation
        #: Channels on which a notification has come since the last turn.
        self.heard: set[str] = set()
        self._called = False
        self._holds_lock = False
        self._took_lock_at = 0.0
        # The writers that may have seen us awake before we took the lock; None until they are asked for.
        self._silent_writers: frozenset[int] | None = None
        self._pause_seconds = 0.0
        self._has_worked = False
        self._idle_wakeups = 0
        self._counted_since = 0.0

    def listen(self) -> None:
        """Hear notifications from now on."""

        # A notification may arrive with the answer to any statement; asking the socket would miss it.
        def hear(notification: psycopg.Notify) -> None:
            self.heard.add(notification.channel)
            if notification.channel == "dovecote_outbox":
                self._instrumentation.rang()

        self._connection.add_notify_handler(hear)
        for channel in _CHANNELS:
            self._connection.execute(f"listen {channel}")

    def turn(self) -> tuple[set[str], bool]:
        """Return the channels that were heard, and whether something ended the last sleep. Before the next read."""
        heard, self.heard = self.heard, set()
        called, self._called = self._called, False
        self._has_worked = False
        if self._holds_lock and self._silent_writers != frozenset():
            self._note_silent_writers()
        return heard, called

    @property
    def is_called(self) -> bool:
        """Something has come that is still to be read."""
        return self._called or bool(self.heard)

    def sleep(self, seconds: float) -> None:
        """Sleep until something comes or the time is over."""
        self._called = self._stop.sleep(seconds, self._connection)

    def busy(self) -> None:
        """Note that this turn has brought something."""
        self._pause_seconds = 0.0
        self._has_worked = True

    def rest(self, *, was_woken: bool) -> None:
        """Pause after many wake-ups that brought nothing: anybody who may connect can send a thousand a second.

        No pause is longer than that between reads beside a writer at work.
        """
        if self._has_worked or not was_woken:
            return
        now = time.monotonic()
        if now - self._counted_since > 1.0:
            self._counted_since, self._idle_wakeups = now, 0
        self._idle_wakeups += 1
        if self._idle_wakeups > _MAX_IDLE_WAKEUPS:
            self._stop.sleep(self._settings.busy_poll_interval_ms / 1_000)

    def stay_awake(self) -> None:
        """Spare writers the notification while there is traffic: it makes them commit one after the other."""
        if self._holds_lock:
            self._connection.execute("select pg_advisory_unlock(dovecote.bell_key())")
            self._holds_lock = False

    def may_sleep(self) -> bool:
        """Return whether every writer from now on calls us; if not, read once more first.

        For what was written before the lock was taken.
        """
        if self._holds_lock:
            return True
        row = self._connection.execute("select pg_try_advisory_lock(dovecote.bell_key())").fetchone()
        self._holds_lock = row == (True,)
        self._took_lock_at = time.monotonic()
        self._silent_writers = None
        if not self._holds_lock:
            # A writer looks at this moment whether we sleep, or holds the lock since before 0019. It will not call.
            self._pause_seconds = min(self._settings.busy_poll_interval_ms / 1_000, self._pause_seconds * 2 or 0.001)
            self._stop.sleep(self._pause_seconds)
        return False

    def look_again_seconds(self) -> float:
        """Return the pause until the next read that nobody asks for.

        Until the last silent writer is over it is short at first, and then a share of the time they have taken: a
        transaction of a minute may wait for some seconds, and one that is forgotten keeps nobody busy.
        """
        if not self._silent_writers:
            return self._settings.poll_interval_seconds
        taken = time.monotonic() - self._took_lock_at
        soon = min(self._settings.busy_poll_interval_ms / 1_000, max(0.001, taken))
        return min(self._settings.poll_interval_seconds, max(soon, taken * _SHARE_OF_A_TRANSACTION))

    def _note_silent_writers(self) -> None:
        """Remember who was at work when we took the lock: they saw us awake, or may have, and say nothing.

        Those that are over by now are found by the read that follows.
        """
        in_flight = frozenset(xid for _, xid in active_writers(self._connection))
        self._silent_writers = in_flight if self._silent_writers is None else self._silent_writers & in_flight
