"""Rows whose envelope cannot be made: each is dead for every handler that wants it, with the reason, and no message.

It is written down before the checkpoint passes the row, so nothing is lost in silence. To an operator it is a dead
letter like any other: discard it, or mend the row in the outbox and retry.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import structlog

from dovecote.errors import DovecoteError
from dovecote.masking import masked
from dovecote.store.envelopes import Connection
from dovecote.telemetry.failures import fingerprint

log = structlog.get_logger()

# What the handler has acted on is done, whatever has become of the row since; what is given up stays given up. A row of
# a retry keeps its replay. Nothing is written by a relay that has been replaced.
_SET_ASIDE = """
    insert into dovecote.deliveries as known (handler_name, event_id, position, aggregate_type, aggregate_id,
        event_type, state, error_type, error_fingerprint, error, replay_id)
    select unreadable.handler, o.id, o.position, o.aggregate_type, o.aggregate_id, o.event_type,
           'dead', %(error_type)s, unreadable.fingerprint, unreadable.error, %(replay)s::uuid
    from unnest(%(handlers)s::text[], %(positions)s::bigint[], %(fingerprints)s::text[], %(errors)s::text[])
        as unreadable (handler, position, fingerprint, error)
    join dovecote.outbox o on o.position = unreadable.position
    where exists (select from dovecote.relay_state where epoch = %(epoch)s)
      and (%(replay)s::uuid is not null
           or not exists (select from dovecote.processed_events p
                          where p.event_id = o.id and p.handler_name = unreadable.handler))
    on conflict (handler_name, event_id) do update set
        state = 'dead', next_attempt_at = null, leased_until = null, error_type = excluded.error_type,
        error_fingerprint = excluded.error_fingerprint, error = excluded.error, updated_at = clock_timestamp()
        where known.state = 'retrying'
"""


class UnreadableRow(DovecoteError):
    """The relay cannot make the envelope of an event; no consumer ever sees it."""


class Unreadable(NamedTuple):
    """A row without an envelope, and a handler that wants it."""

    handler: str
    position: int
    problem: str


def set_aside(connection: Connection, epoch: int, rows: Sequence[Unreadable], replay: UUID | None = None) -> None:
    """Write down that these are dead. One that was discarded, or acted on, stays as it is."""
    if not rows:
        return
    errors = [UnreadableRow(masked(problem)) for _, _, problem in rows]
    connection.execute(
        _SET_ASIDE,
        {
            "epoch": epoch,
            "replay": replay,
            "error_type": UnreadableRow.__qualname__,
            "handlers": [row.handler for row in rows],
            "positions": [row.position for row in rows],
            "fingerprints": [fingerprint(error) for error in errors],
            "errors": [_text(row, error) for row, error in zip(rows, errors, strict=True)],
        },
    )


def report(problems: Mapping[int, str]) -> None:
    """Log what is set aside; where no handler wants the event this is all that tells of it."""
    for position, problem in problems.items():
        log.error("an event cannot be read and is set aside", position=position, problem=masked(problem))


def _text(row: Unreadable, error: UnreadableRow) -> str:
    return (
        f"{UnreadableRow.__qualname__}: {error}\n"
        f"The row at position {row.position} of dovecote.outbox is in no message, and {row.handler} has not seen it.\n"
        "Discard it, or mend the row there (as its owner) and retry it."
    )
