"""Publish only what a standby has flushed: then no failover to it forgets an event that was acted on.

Enabled by DOVECOTE_RELAY__PUBLISH_AFTER=standby. The position to wait for is taken after the rows were read, so it is
beyond their commits. There is no time-out: publishing without the standby would void the guarantee.
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

_MAX_PAUSE_SECONDS = 0.1
# A standby that is merely slow is not logged.
_LOG_AFTER_SECONDS = 1.0
_LOG_INTERVAL_SECONDS = 60.0
# An open transaction may have written WAL that is not flushed before it ends: then we flush it.
_FLUSH_AFTER_SECONDS = 0.01

# A record of WAL and a commit that is flushed here, and waits for no standby.
_FLUSH = """
    select set_config('synchronous_commit', 'local', true), pg_logical_emit_message(true, 'dovecote', '')
"""


class NotOnStandby(DovecoteError):
    """The relay was stopped while no standby had flushed what was to be published; it is not published."""

    def __init__(self) -> None:
        super().__init__("stopped before a standby had flushed what was read; the next relay publishes it")


class StandbyFlush:
    """Blocks the relay until a standby has flushed what was read, if the settings require it.

    send_heartbeat  called about once a second while it waits
    """

    def __init__(
        self,
        settings: RelaySettings,
        leads: Connection,
        records: Connection,
        stop: StopFlag,
        instrumentation: RelayInstrumentation,
        send_heartbeat: Callable[[], None] = lambda: None,
    ) -> None:
        self._is_wanted = settings.publish_after == "standby"
        self._leads = leads
        self._records = records
        self._stop = stop
        self._instrumentation = instrumentation
        self._send_heartbeat = send_heartbeat
        if self._is_wanted and (blind := blindness(records)):
            log.warning("no standby can be seen", cure=blind)

    def await_flush(self) -> None:
        """Return when a standby has flushed all that is visible now.

        Errors: NotOnStandby when stopped; psycopg.Error.
        """
        if not self._is_wanted:
            return
        began = time.monotonic()
        is_flushed, upto = self._ask(None)
        pause, next_log, next_alive, flushes = 0.0005, began + _LOG_AFTER_SECONDS, began + _LOG_AFTER_SECONDS, True
        while not is_flushed:
            if self._stop.is_set():
                raise NotOnStandby
            self._stop.sleep(pause)
            pause = min(_MAX_PAUSE_SECONDS, pause * 1.5)
            now = time.monotonic()
            if flushes and now - began > _FLUSH_AFTER_SECONDS:
                flushes = False
                self._records.execute(_FLUSH)
            if now >= next_log:
                next_log = now + _LOG_INTERVAL_SECONDS
                hint = {"cure": blind} if (blind := blindness(self._records)) else {}
                log.warning(
                    "waiting for a standby to flush what was read", seconds=round(now - began), upto=upto, **hint
                )
            if now >= next_alive:
                next_alive = now + _LOG_AFTER_SECONDS
                self._instrumentation.alive("waiting_for_standby")
                self._send_heartbeat()
                # The leadership ends with this session: its loss must be noticed here.
                self._leads.execute("select")
            is_flushed, _ = self._ask(upto)

    def _ask(self, upto: str | None) -> tuple[bool, str]:
        is_flushed, now = self._records.execute(FLUSHED, {"upto": upto}).fetchone() or (None, "")
        return is_flushed is True, now
