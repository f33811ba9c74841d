"""Deliveries that no message can be made for: they become dead letters, with the reason.

Either the envelope of the row cannot be made, or the row is not in the outbox any more: deleted by hand, or lost with
a database that was restored. It is recorded before the checkpoint passes the row, so nothing is lost silently. To an
operator it is a dead letter like any other: discard it, or repair the outbox and retry it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import UUID

import structlog

from dovecote.errors import DovecoteError
from dovecote.masking import masked
from dovecote.route import Route
from dovecote.store.envelopes import Connection
from dovecote.telemetry.failures import fingerprint

log = structlog.get_logger()

# Rows without an envelope ------------------------------------------------------------------------

# An event that the handler has processed stays so, even if its row has changed since; a discarded one stays discarded.
# A retry keeps its replay. Nothing is written by a relay that has been replaced.
_RECORD_UNREADABLE = """
    insert into dovecote.deliveries as known (handler_name, event_id, position, aggregate_type, aggregate_id,
        event_type, state, error_type, headline, error_fingerprint, error, replay_id)
    select unreadable.handler, o.id, o.position, o.aggregate_type, o.aggregate_id, o.event_type,
           'dead', %(error_type)s, split_part(unreadable.error, E'\n', 1), unreadable.fingerprint, unreadable.error,
           %(replay)s::uuid
    from unnest(%(handlers)s::text[], %(positions)s::bigint[], %(fingerprints)s::text[], %(errors)s::text[])
        as unreadable (handler, position, fingerprint, error)
    join dovecote.outbox o on o.position = unreadable.position
    where exists (select from dovecote.relay_state where epoch = %(epoch)s)
      and (%(replay)s::uuid is not null
           or not exists (select from dovecote.processed_events p
                          where p.event_id = o.id and p.handler_name = unreadable.handler))
    on conflict (handler_name, event_id) do update set
        state = 'dead', next_attempt_at = null, leased_until = null, error_type = excluded.error_type,
        headline = excluded.headline, error_fingerprint = excluded.error_fingerprint, error = excluded.error,
        updated_at = clock_timestamp()
        where known.state = 'retrying'
"""


class UnreadableRow(DovecoteError):
    """The relay cannot make the envelope of an event; no consumer gets it."""


class Unreadable(NamedTuple):
    """A row without an envelope, and a handler that wants it."""

    handler: str
    position: int
    problem: str


def record_unreadable(
    connection: Connection, epoch: int, rows: Sequence[Unreadable], replay: UUID | None = None
) -> None:
    """Dead-letter these. An event that was discarded or processed stays as it is."""
    if not rows:
        return
    errors = [UnreadableRow(masked(problem)) for _, _, problem in rows]
    connection.execute(
        _RECORD_UNREADABLE,
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
    """Log what is recorded as unreadable; if no handler wants the event, this is the only record."""
    for position, problem in problems.items():
        log.error("an event cannot be read", position=position, problem=masked(problem))


def _text(row: Unreadable, error: UnreadableRow) -> str:
    return (
        f"{UnreadableRow.__qualname__}: {error}\n"
        f"The row at position {row.position} of dovecote.outbox is in no message, and {row.handler} has not seen it.\n"
        "Discard it, or repair the row there (as its owner) and retry it."
    )


# Events that are gone -----------------------------------------------------------------------------

# A row that a worker has locked is being handled: it is looked at again after its lease.
_DEAD_LETTER_GONE = """
    with gone as (
        select d.handler_name, d.event_id
        from unnest(%(handlers)s::text[], %(event_ids)s::uuid[]) as asked (handler, event_id)
        join dovecote.deliveries d on d.handler_name = asked.handler and d.event_id = asked.event_id
        where d.state = 'retrying' and not exists (select from dovecote.outbox o where o.id = d.event_id)
        for update of d skip locked
    )
    update dovecote.deliveries d
    set state = 'dead', next_attempt_at = null, leased_until = null, error_type = %(error_type)s,
        headline = %(error)s, error_fingerprint = %(fingerprint)s, error = %(error)s, updated_at = clock_timestamp()
    from gone where d.handler_name = gone.handler_name and d.event_id = gone.event_id
    returning d.handler_name, d.event_id, d.aggregate_type, d.aggregate_id, d.position, d.replay_id
"""

_RELEASE_NEXT = """
    select dovecote.release_next(%(handler)s, %(event_types)s::text[], array[%(aggregate_type)s],
                                 array[%(aggregate_id)s], array[%(position)s::bigint], %(replay)s::uuid)
"""

_ERROR = (
    "the event is not in dovecote.outbox any more: it was deleted there, or this database was restored without it. "
    "No handler can act on it. Discard it; or put the row back (as the owner of the table, with this id) and retry"
)


class EventIsGone(DovecoteError):
    """The event of a delivery is not in the outbox."""

    def __init__(self) -> None:
        super().__init__(_ERROR)


def dead_letter_gone(connection: Connection, routes: Sequence[Route], gone: Sequence[tuple[str, UUID]]) -> None:
    """Dead-letter these (handler, event id), and release the events that wait behind them.

    An event that is gone blocks nothing: the order of a handler is that of the outbox.
    """
    error = EventIsGone()
    parameters = {
        "error_type": EventIsGone.__qualname__,
        "fingerprint": fingerprint(error),
        "error": f"{EventIsGone.__qualname__}: {error}",
        "handlers": [handler for handler, _ in gone],
        "event_ids": [event_id for _, event_id in gone],
    }
    ordered = {route.handler: route.event_types for route in routes if route.ordered}
    for handler, event_id, aggregate_type, aggregate_id, position, replay in connection.execute(
        _DEAD_LETTER_GONE, parameters
    ):
        log.warning(
            "the event of a delivery is not in the outbox; the delivery is dead",
            handler=handler,
            event_id=str(event_id),
            position=position,
        )
        if handler in ordered:
            behind = {
                "handler": handler,
                "event_types": ordered[handler],
                "aggregate_type": aggregate_type,
                "aggregate_id": aggregate_id,
                "position": position,
                "replay": replay,
            }
            connection.execute(_RELEASE_NEXT, behind)
