"""Whether positions are handed out in order: each above all that are known. Otherwise new events are never read.

A sequence is set back by a restore without it, by logical replication, by hand; with a cache each session has a block
of its own. The relay then does not lead, and logs it; `dovecote recover` repairs it.
"""

import time

import psycopg
import structlog

from dovecote.errors import DovecoteError, NewerRelay
from dovecote.store.envelopes import Connection

log = structlog.get_logger()

#: How often a relay that must not lead checks again.
ASK_AGAIN_SECONDS = 2.0
# A leader notices an altered cache or increment after this long, and with the next read a sequence that was set back.
_POLL_INTERVAL_SECONDS = 10.0

_FAULT = "select dovecote.sequence_fault()"
_MAY_LEAD = "select dovecote.sequence_fault(), refused_since is not null from dovecote.relay_state"
_REFUSED = "update dovecote.relay_state set refused_since = clock_timestamp() where refused_since is null"
_RECOVER = """
    select renumbered
    from dovecote.recover('relay', 'the sequence was repaired by hand, and hid what was written before')
"""
_LOOK = "select dovecote.sequence_fault(), epoch, dovecote.outbox_run() from dovecote.relay_state"


class SequenceFault(DovecoteError):
    """Positions are not handed out in order; the message is that of `dovecote.sequence_fault()`."""


def fault(connection: Connection) -> str | None:
    """Return what is wrong with the sequence; None where nothing is."""
    (found,) = connection.execute(_FAULT).fetchone() or (None,)
    return None if found is None else str(found)


def refusal(connection: Connection) -> str | None:
    """Return why the holder of the leader's lock must not lead; None when it may.

    A sequence that was repaired by hand may hide events that were written before: `recover` renumbers them.
    """
    found, was_refused = connection.execute(_MAY_LEAD).fetchone() or (None, False)
    if found is not None:
        connection.execute(_REFUSED)
        return str(found)
    if was_refused:
        try:
            (renumbered,) = connection.execute(_RECOVER).fetchone() or (None,)
        except psycopg.errors.LockNotAvailable:
            return "the sequence is repaired, and transactions that wrote before are still open: end them"
        log.warning("the sequence is repaired", renumbered=renumbered)
    return None


class SequenceWatch:
    """Checks now and then whether the sequence and the outbox are still those with which this leadership began.

    `run` is what the messages say they were sent in: `dovecote.outbox_run()`. Without a restart it is another one after
    VACUUM FULL of relay_state, and after a reset of the server's statistics: consumers would look up every event.
    """

    def __init__(self, connection: Connection, epoch: int, run: str) -> None:
        self._connection = connection
        self._epoch = epoch
        self._run = run
        self._next_look = time.monotonic() + _POLL_INTERVAL_SECONDS

    def look(self) -> None:
        """Do nothing until it is time.

        Errors: SequenceFault; NewerRelay when the sequence was recovered or the run is another: the next begins anew.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _POLL_INTERVAL_SECONDS
        fault, epoch, run = self._connection.execute(_LOOK).fetchone() or (None, None, None)
        if fault is not None:
            raise SequenceFault(fault)
        if epoch != self._epoch:
            raise NewerRelay(f"epoch {self._epoch} is over")
        if run != self._run:
            raise NewerRelay(f"epoch {self._epoch} is over: run {self._run} of the outbox is now {run}")
