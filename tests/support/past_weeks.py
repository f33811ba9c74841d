"""Weeks that are over, made now: the outbox refuses ids of another day, so a superuser puts them in past its check."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from dovecote.events.ids import uuid7


def monday(weeks_ago: int) -> datetime:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return today - timedelta(days=today.weekday(), weeks=weeks_ago)


def suffix(weeks_ago: int) -> str:
    year, number, _ = monday(weeks_ago).isocalendar()
    return f"{year}w{number:02}"


def an_old_id(weeks_ago: int, hours: float = 60) -> UUID:
    """A UUIDv7 of that week, so many hours after its Monday began."""
    milliseconds = int((monday(weeks_ago) + timedelta(hours=hours)).timestamp() * 1000)
    return UUID(int=(milliseconds << 80) | (uuid7().int & ((1 << 80) - 1)))


_INSERT = text(
    """
    insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, created_at)
    values (:id, 'thing', :aggregate_id, :event_type, '{"n": 1}', dovecote.uuid_v7_time(:id))
    returning position
    """
)


def write_old(
    connection: Connection, ids: Sequence[UUID], event_type: str = "test.noted.v1", of: str = "1"
) -> list[int]:
    """Write events with these ids in this transaction, which must be a superuser's; return their positions."""
    connection.execute(text("alter table dovecote.outbox disable trigger check_event"))
    written = [
        connection.execute(_INSERT, {"id": one, "aggregate_id": of, "event_type": event_type}).scalar_one()
        for one in ids
    ]
    connection.execute(text("alter table dovecote.outbox enable trigger check_event"))
    return written


def publish_all(connection: Connection) -> None:
    """Note everything as published, each event when it was written."""
    connection.execute(
        text(
            """
            insert into dovecote.published_batches (positions, events, epoch, published_at)
            select int8multirange(int8range(o.position, o.position, '[]')), 1, 1, o.created_at
            from dovecote.outbox o, dovecote.relay_state s where o.position > s.checkpoint
            """
        )
    )
    connection.execute(
        text(
            "update dovecote.relay_state set checkpoint = greatest(checkpoint, (select coalesce(max(position), 0)"
            " from dovecote.outbox))"
        )
    )


def process(connection: Connection, ids: Sequence[UUID], handler: str = "test.note") -> None:
    connection.execute(
        text(
            "insert into dovecote.processed_events (event_id, handler_name, processed_at)"
            " select id, :handler, dovecote.uuid_v7_time(id) from unnest(cast(:ids as uuid[])) as t (id)"
        ),
        {"handler": handler, "ids": list(ids)},
    )


def subscribe(engine: Engine, handler: str = "test.note", event_type: str = "test.noted.v1", since: int = 0) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("insert into dovecote.subscriptions values (:handler, :event_type, :since)"),
            {"handler": handler, "event_type": event_type, "since": since},
        )


def fail(connection: Connection, event_id: UUID, state: str, handler: str = "test.note") -> None:
    connection.execute(
        text(
            """
            insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,
                                             event_type, state, next_attempt_at)
            select :handler, id, position, aggregate_type, aggregate_id, event_type, :state,
                   case :state when 'retrying' then now() end
            from dovecote.outbox where id = :id
            """
        ),
        {"handler": handler, "id": event_id, "state": state},
    )
