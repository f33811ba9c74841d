"""The table that makes an effect happen once, and all SQL on it.

The row is written first, in the transaction of the effect: two workers with the same event meet on its
key before either has acted, and a rolled-back effect takes its mark along.
"""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Column, DateTime, Table, Text, Uuid, func, text
from sqlalchemy.orm import Session

from domain.database import array, metadata

processed_events = Table(
    "processed_events",
    metadata,
    Column("event_id", Uuid, primary_key=True),
    Column("handler_name", Text, primary_key=True),
    Column("processed_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("replay_id", Uuid),
    postgresql_partition_by="RANGE (event_id)",
)

# Sorted by id, so that two bundles that share events wait for each other instead of deadlocking.
_mark = text(
    """
    insert into dovecote.processed_events (event_id, handler_name)
    select event_id, :handler_name from unnest(cast(:event_ids as uuid[])) as bundle (event_id)
    order by event_id
    on conflict do nothing
    returning event_id
    """
)


def mark(session: Session, handler_name: str, event_ids: Sequence[UUID]) -> set[UUID]:
    """Record that the handler acts on these events now; return those it had not acted on before.

    Waits for another transaction that is acting on one of them, and skips that one if it commits.
    """
    found = session.execute(_mark, {"handler_name": handler_name, "event_ids": array(event_ids)})
    return set(found.scalars())
