"""Deliveries whose event is not in the outbox: deleted by hand, or lost with a database that was restored.

Nobody can send them. Each is dead from then on, with the reason, so that an operator sees it. What waits behind it
waits for nothing any more: a handler's order is that of the outbox.
"""

from collections.abc import Sequence
from uuid import UUID

import psycopg
import structlog
from psycopg.rows import TupleRow

from dovecote.errors import DovecoteError
from dovecote.route import Route
from dovecote.telemetry.failures import fingerprint

log = structlog.get_logger()

# One that a worker is at work on is left to it; it is looked at again after its lease.
_BURY = """
    with gone as (
        select d.handler_name, d.event_id
        from unnest(%(handlers)s::text[], %(event_ids)s::uuid[]) as asked (handler, event_id)
        join dovecote.deliveries d on d.handler_name = asked.handler and d.event_id = asked.event_id
        where d.state = 'retrying' and not exists (select from dovecote.outbox o where o.id = d.event_id)
        for update of d skip locked
    )
    update dovecote.deliveries d
    set state = 'dead', next_attempt_at = null, leased_until = null, error_type = %(error_type)s,
        error_fingerprint = %(fingerprint)s, error = %(error)s, updated_at = clock_timestamp()
    from gone where d.handler_name = gone.handler_name and d.event_id = gone.event_id
    returning d.handler_name, d.event_id, d.aggregate_type, d.aggregate_id, d.position, d.replay_id
"""

_RELEASE_NEXT = """
    select dovecote.release_next(%(handler)s, %(event_types)s::text[], array[%(aggregate_type)s],
                                 array[%(aggregate_id)s], array[%(position)s::bigint], %(replay)s::uuid)
"""

_ERROR = (
    "the event is not in dovecote.outbox any more: it was deleted there, or this database was restored without it. "
    "Nobody can act on it. Discard it; or put the row back (as the owner of the table, with this id) and retry"
)


class EventIsGone(DovecoteError):
    """A delivery tells of an event that the outbox does not have."""

    def __init__(self) -> None:
        super().__init__(_ERROR)


def bury_gone(
    connection: psycopg.Connection[TupleRow], routes: Sequence[Route], gone: Sequence[tuple[str, UUID]]
) -> None:
    """Write down that these (handler, event id) are dead, and send on what waits behind them."""
    error = EventIsGone()
    parameters = {
        "error_type": EventIsGone.__qualname__,
        "fingerprint": fingerprint(error),
        "error": f"{EventIsGone.__qualname__}: {error}",
        "handlers": [handler for handler, _ in gone],
        "event_ids": [event_id for _, event_id in gone],
    }
    ordered = {route.handler: route.event_types for route in routes if route.ordered}
    for handler, event_id, aggregate_type, aggregate_id, position, replay in connection.execute(_BURY, parameters):
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
