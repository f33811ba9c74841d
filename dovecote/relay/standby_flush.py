"""Publish only what a standby has flushed: then no failover to it forgets an event that was acted on.

Asked for by DOVECOTE_RELAY__PUBLISH_AFTER=standby. The position to wait for is taken after the rows were read, so it is
beyond their commits. There is no time-out: publishing all the same would give back what was paid for.
"""

import time
from collections.abc import Callable

import structlog

from dovecote.errors import DovecoteError
from dovecote.processes.stop_flag import StopFlag
from dovecote.settings import Relay as RelaySettings
from dovecote.store.envelopes import Connection
from dovecote.store.standbys import FLUSHED, blindness
from dovecote.telemetry.instrumentation import RelayInstrumentation

log = structlog.get_logger()

_LONGEST_PAUSE_SECONDS = 0.1
# A standby that is merely slow is not worth a word.
_TELL_AFTER_SECONDS = 1.0
_TELL_AGAIN_SECONDS = 60.0
# A transaction that is open has written something that nobody flushes before it ends. So we do.
_FLUSH_AFTER_SECONDS = 0.01

# A record of WAL and a commit that is flushed here, and waits for no standby.
_FLUSH = """
    select set_config('synchronous_commit', 'local', true), pg_logical_emit_message(true, 'dovecote', '')
"""


class NotOnStandby(DovecoteError):
    """The relay was told to stop while no standby had what it wanted to publish; it is not published."""

    def __init__(self) -> None:
        super().__init__("stopped before a standby had flushed what was read; the next relay publishes it")


class Standby:
    """Holds a relay up until a standby has what was read; not at all, unless the settings ask for it.

    tell_alive  called about once a second while it waits
    """

    def __init__(
        self,
        settings: RelaySettings,
        leads: Connection,
        records: Connection,
        stop: StopFlag,
        instrumentation: RelayInstrumentation,
        tell_alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._is_wanted = settings.publish_after == "standby"
        self._leads = leads
        self._records = records
        self._stop = stop
        self._instrumentation = instrumentation
        self._tell_alive = tell_alive
        if self._is_wanted and (blind := blindness(records)):
            log.warning("no standby can be seen", cure=blind)

    def await_flush(self) -> None:
        """Return when a standby has flushed all that is visible now.

        Errors: NotOnStandby when told to stop; psycopg.Error.
        """
        if not self._is_wanted:
            return
        began = time.monotonic()
        is_flushed, upto = self._ask(None)
        pause, next_told, next_alive, flushes = 0.0005, began + _TELL_AFTER_SECONDS, began + _TELL_AFTER_SECONDS, True
        while not is_flushed:
            if self._stop.is_set():
                raise NotOnStandby
            self._stop.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, pause * 1.5)
            now = time.monotonic()
            if flushes and now - began > _FLUSH_AFTER_SECONDS:
                flushes = False
                self._records.execute(_FLUSH)
            if now >= next_told:
                next_told = now + _TELL_AGAIN_SECONDS
                hint = {"cure": blind} if (blind := blindness(self._records)) else {}
                log.warning(
                    "waiting for a standby to flush what was read", seconds=round(now - began), upto=upto, **hint
                )
            if now >= next_alive:
                next_alive = now + _TELL_AFTER_SECONDS
                self._instrumentation.alive("waiting_for_standby")
                self._tell_alive()
                # The leadership lives as long as this session: its end must not go unnoticed here.
                self._leads.execute("select")
            is_flushed, _ = self._ask(upto)

    def _ask(self, upto: str | None) -> tuple[bool, str]:
        is_flushed, now = self._records.execute(FLUSHED, {"upto": upto}).fetchone() or (None, "")
        return is_flushed is True, now
