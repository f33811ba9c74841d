"""The table that makes an effect happen once, and all SQL on it.

The row is written first, in the transaction of the effect: two workers with the same event meet on its
key before either has acted, and a rolled-back effect takes its mark along.
"""

from collections.abc import Collection
from uuid import UUID

from sqlalchemy import Column, DateTime, Table, Text, Uuid, func, text
from sqlalchemy.orm import Session

from dovecote.database import metadata, uuid_array

processed_events = Table(
    "processed_events",
    metadata,
    Column("event_id", Uuid, primary_key=True),
    Column("handler_name", Text, primary_key=True),
    Column("processed_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Column("replay_id", Uuid),
    postgresql_partition_by="RANGE (event_id)",
)

# Sorted by id, so that two bundles that share events wait for each other instead of deadlocking. What comes back is
# what was not new: usually nothing, and reading hundreds of ids would cost as much as writing them.
_mark = text(
    """
    with bundle as (
        select event_id from pg_catalog.unnest(cast(:event_ids as uuid[])) as bundle (event_id)
    ), fresh as (
        insert into dovecote.processed_events (event_id, handler_name)
        select event_id, :handler_name from bundle order by event_id
        on conflict do nothing
        returning event_id
    )
    select event_id from bundle where event_id not in (select event_id from fresh)
    """
)

# A handler has one replay at a time, and it is done when all its events are: a message of an older one is a
# duplicate, unless it is the retry of what that one left behind. Locked in the order of ids, as above.
_mark_again = text(
    """
    with bundle as (
        select event_id from dovecote.processed_events
        where handler_name = :handler_name and event_id = any(cast(:event_ids as uuid[]))
          and replay_id is distinct from :replay_id
          and exists (select from dovecote.replays
                      where id = :replay_id and state <> 'cancelled' and (state <> 'done' or :as_retry))
        order by event_id
        for update
    )
    update dovecote.processed_events p set replay_id = :replay_id, processed_at = clock_timestamp()
    from bundle where p.handler_name = :handler_name and p.event_id = bundle.event_id
    returning p.event_id
    """
)


def mark(session: Session, handler_name: str, event_ids: Collection[UUID]) -> set[UUID]:
    """Record that the handler acts on these events now; return those it had acted on before.

    Waits for another transaction that is acting on one of them, and skips that one if it commits.
    """
    found = session.execute(_mark, {"handler_name": handler_name, "event_ids": uuid_array(event_ids)})
    return set(found.scalars())


def mark_again(
    session: Session, handler_name: str, event_ids: Collection[UUID], replay_id: UUID, *, as_retry: bool
) -> set[UUID]:
    """Record that a replay has the handler act on these events again; return those it has not done so yet.

    Waits like `mark`. What the handler has never acted on is in no such replay. A cancelled replay marks nothing, one
    that is done only `as_retry`, for events that failed in it.
    """
    found = session.execute(
        _mark_again,
        {
            "handler_name": handler_name,
            "event_ids": uuid_array(event_ids),
            "replay_id": replay_id,
            "as_retry": as_retry,
        },
    )
    return set(found.scalars())
