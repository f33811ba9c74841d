"""Whether positions are handed out in order: each above all that are known. Otherwise new events are never read.

A sequence is set back by a restore without it, by logical replication, by hand; with a cache each session has a block
of its own. The relay then does not lead, and says so; `dovecote recover` is the cure (migration 0025).
"""

import time

import psycopg
import structlog

from domain.errors import DovecoteError
from workers.broker import NewerRelay
from workers.relay.envelopes import Connection

log = structlog.get_logger()

#: How often a relay that does not lead asks again.
ASK_AGAIN_SECONDS = 2.0
# Who alters the sequence while somebody leads is found out after this long. One that is set back, the next read sees.
_LOOK_SECONDS = 10.0

_FAULT = "select dovecote.sequence_fault()"
_MAY_LEAD = "select dovecote.sequence_fault(), refused_since is not null from dovecote.relay_state"
_REFUSED = "update dovecote.relay_state set refused_since = clock_timestamp() where refused_since is null"
_RECOVER = "select handed_out, renumbered from dovecote.recover_sequence()"
_LOOK = "select dovecote.sequence_fault(), epoch from dovecote.relay_state"


class SequenceFault(DovecoteError):
    """Positions are not handed out in order; the message is what `dovecote.sequence_fault()` says."""


def fault(connection: Connection) -> str | None:
    """Return what is wrong with the sequence; None where nothing is."""
    (found,) = connection.execute(_FAULT).fetchone() or (None,)
    return None if found is None else str(found)


def refusal(connection: Connection) -> str | None:
    """Return why the holder of the leader's lock must not lead; None when it may.

    A sequence that somebody has mended by hand may hide events that were written before: they are made to be read.
    """
    found, was_refused = connection.execute(_MAY_LEAD).fetchone() or (None, False)
    if found is not None:
        connection.execute(_REFUSED)
        return str(found)
    if was_refused:
        try:
            handed_out, renumbered = connection.execute(_RECOVER).fetchone() or (None, None)
        except psycopg.errors.LockNotAvailable:
            return "the sequence is mended, and transactions that wrote before are still open: end them"
        log.warning("the sequence is mended", handed_out=handed_out, renumbered=renumbered)
    return None


class SequenceWatch:
    """Looks now and then whether the sequence is still as it was when this relay began to lead."""

    def __init__(self, connection: Connection, epoch: int) -> None:
        self._connection = connection
        self._epoch = epoch
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def look(self) -> None:
        """Do nothing until it is time.

        Errors: SequenceFault; NewerRelay when the sequence was recovered meanwhile: it has to be begun anew.
        """
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        fault, epoch = self._connection.execute(_LOOK).fetchone() or (None, None)
        if fault is not None:
            raise SequenceFault(fault)
        if epoch != self._epoch:
            raise NewerRelay(f"epoch {self._epoch} is over")
