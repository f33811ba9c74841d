"""When the relay may sleep, and what wakes it.

The relay sleeps only while it holds the wake-up lock. A writer that finds the lock taken sends a notification with its
commit; one that finds it free sends none: the relay is awake and reads its rows (docs/adr/0005-waking-the-relay.md).
A writer that found the lock free and commits once the relay sleeps does not notify: the relay knows such writers by
their transactions, and polls until they have ended (docs/adr/0027-long-transactions-and-snapshots.md).
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

# How long the event of such a writer may wait after its commit, as a share of the duration of its transaction.
_SHARE_OF_A_TRANSACTION = 1 / 8

# Per second. Each event of a quiet stream causes one or two such wake-ups, and a pause would delay the next event.
_MAX_IDLE_WAKEUPS = 100


class Wakeup:
    """The notifications of the leading relay, and the lock by which writers know that it sleeps."""

    def __init__(
        self, connection: Connection, stop: StopFlag, settings: RelaySettings, instrumentation: RelayInstrumentation
    ) -> None:
        self._connection = connection
        self._stop = stop
        self._settings = settings
        self._instrumentation = instrumentation
        #: Channels with a notification since the last turn.
        self.heard: set[str] = set()
        self._was_woken = False
        self._holds_lock = False
        self._took_lock_at = 0.0
        # The writers that may have found the lock free before we took it; None until they are read.
        self._silent_writers: frozenset[int] | None = None
        self._pause_seconds = 0.0
        self._has_worked = False
        self._idle_wakeups = 0
        self._counted_since = 0.0

    def listen(self) -> None:
        """Subscribe to notifications."""

        # A notification may arrive with the answer to any statement; polling the socket would miss it.
        def hear(notification: psycopg.Notify) -> None:
            self.heard.add(notification.channel)
            if notification.channel == "dovecote_outbox":
                self._instrumentation.rang()

        self._connection.add_notify_handler(hear)
        for channel in _CHANNELS:
            self._connection.execute(f"listen {channel}")

    def turn(self) -> tuple[set[str], bool]:
        """Return the notified channels, and whether the last sleep was ended early. Called before the next read."""
        heard, self.heard = self.heard, set()
        was_woken, self._was_woken = self._was_woken, False
        self._has_worked = False
        if self._holds_lock and self._silent_writers != frozenset():
            self._note_silent_writers()
        return heard, was_woken

    @property
    def is_woken(self) -> bool:
        """Something has arrived that is still to be read."""
        return self._was_woken or bool(self.heard)

    def sleep(self, seconds: float) -> None:
        """Sleep until something arrives or the time is over."""
        self._was_woken = self._stop.sleep(seconds, self._connection)

    def busy(self) -> None:
        """Note that this turn has found something."""
        self._pause_seconds = 0.0
        self._has_worked = True

    def rest(self, *, was_woken: bool) -> None:
        """Pause after many idle wake-ups: any login that may connect can send a thousand a second.

        The pause is no longer than the poll interval beside an active writer.
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
        """Spare writers the notification while there is traffic: it serializes their commits."""
        if self._holds_lock:
            self._connection.execute("select pg_advisory_unlock(dovecote.wakeup_key())")
            self._holds_lock = False

    def may_sleep(self) -> bool:
        """Return whether every writer notifies us from now on.

        If not, read once more first, for what was written before the lock was taken.
        """
        if self._holds_lock:
            return True
        row = self._connection.execute("select pg_try_advisory_lock(dovecote.wakeup_key())").fetchone()
        self._holds_lock = row == (True,)
        self._took_lock_at = time.monotonic()
        self._silent_writers = None
        if not self._holds_lock:
            # A writer is just testing the lock. It will not notify.
            self._pause_seconds = min(self._settings.busy_poll_interval_ms / 1_000, self._pause_seconds * 2 or 0.001)
            self._stop.sleep(self._pause_seconds)
        return False

    def next_poll_seconds(self) -> float:
        """Return the pause until the next poll.

        Until the last silent writer has ended it is short at first, and then a share of the time they have taken: a
        transaction of a minute may wait for some seconds, and one that is left open keeps nothing busy.
        """
        if not self._silent_writers:
            return self._settings.poll_interval_seconds
        taken = time.monotonic() - self._took_lock_at
        soon = min(self._settings.busy_poll_interval_ms / 1_000, max(0.001, taken))
        return min(self._settings.poll_interval_seconds, max(soon, taken * _SHARE_OF_A_TRANSACTION))

    def _note_silent_writers(self) -> None:
        """Remember the writers that were active when we took the lock: they may have found it free, and do not notify.

        The rows of those that have ended by now are found by the read that follows.
        """
        in_flight = frozenset(xid for _, xid in active_writers(self._connection))
        self._silent_writers = in_flight if self._silent_writers is None else self._silent_writers & in_flight
