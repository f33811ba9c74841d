"""What a user would write first, done well: its outbox, its relay, its consumers. The yardstick.

    python -m benchmarks.naive         the relay
    dramatiq benchmarks.naive:broker   the consumers

It is honest: the right index, rows locked so that several relays could run, statements prepared by psycopg,
one connection a thread, no ORM. It is complete: an event is acted on once, because its consumer keeps
a table of what it has done.
"""

import os
import signal
import threading
from typing import Any

import dramatiq
import psycopg
from dramatiq.brokers.redis import RedisBroker
from psycopg.rows import TupleRow

SCHEMA = """
    create schema naive;
    create table naive.outbox (
        id             uuid        not null default gen_random_uuid() primary key,
        aggregate_type text        not null,
        aggregate_id   text        not null,
        event_type     text        not null,
        payload        jsonb       not null,
        headers        jsonb       not null default '{}',
        created_at     timestamptz not null default clock_timestamp(),
        processed_at   timestamptz
    );
    create index outbox_todo_idx on naive.outbox (created_at) where processed_at is null;
    create table naive.processed_events (
        event_id     uuid        not null,
        handler_name text        not null,
        processed_at timestamptz not null default clock_timestamp(),
        primary key (event_id, handler_name)
    );
"""

_NEXT = """
    select id, aggregate_type, aggregate_id, event_type, payload, headers, created_at from naive.outbox
    where processed_at is null order by created_at limit 100 for update skip locked
"""
_DONE = "update naive.outbox set processed_at = clock_timestamp() where id = any(%s)"
_MARK = """
    insert into naive.processed_events (event_id, handler_name) values (%s, %s)
    on conflict do nothing returning event_id
"""
APPLY = """
    insert into dovecote.latest_prices as latest (symbol, price, as_of, position, quotes_applied)
    values (%(symbol)s, %(price)s, %(as_of)s, 0, 1)
    on conflict (symbol) do update set
        quotes_applied = latest.quotes_applied + 1,
        price = case when excluded.as_of >= latest.as_of then excluded.price else latest.price end,
        as_of = greatest(excluded.as_of, latest.as_of)
"""
#: The same for asyncpg, which counts its parameters and takes no text for a number or a timestamp.
APPLY_POSITIONAL = (
    APPLY.replace("%(symbol)s", "$1")
    .replace("%(price)s", "$2::text::numeric")
    .replace("%(as_of)s", "$3::text::timestamptz")
)
_WRITE = """
    insert into dovecote.billing_history (membership_id, user_id, event_type, amount_minor, currency, invoice_id,
                                          description, occurred_at, source_event_id)
    values (%(membership_id)s, %(user_id)s, %(event_type)s, %(amount_minor)s, %(currency)s, %(invoice_id)s,
            %(description)s, %(occurred_at)s, %(source_event_id)s)
"""

Connection = psycopg.Connection[TupleRow]

# Dramatiq's own broker, as a user has it; its code has no types.
broker = RedisBroker(  # type: ignore[no-untyped-call]
    url=os.environ.get("REDIS_URL"), namespace=os.environ.get("DOVECOTE_REDIS__NAMESPACE", "dramatiq")
)
dramatiq.set_broker(broker)
_of_thread = threading.local()


@dramatiq.actor(queue_name="pricing")
def apply_quote(event_id: str, event: dict[str, Any]) -> None:
    """Act on one event in one transaction, once."""
    connection = connection_of_thread()
    with connection.transaction():
        if connection.execute(_MARK, (event_id, "apply_quote")).fetchone():
            connection.execute(APPLY, event["data"])


@dramatiq.actor(queue_name="billing")
def write_history(event_id: str, event: dict[str, Any]) -> None:
    """Write one line of a membership's history, once."""
    connection = connection_of_thread()
    with connection.transaction():
        if connection.execute(_MARK, (event_id, "write_history")).fetchone():
            line = {**event["data"], "event_type": event["type"], "source_event_id": event_id}
            connection.execute(_WRITE, {**line, **line["amount"]})


_ACTORS = {"pricing.price_quoted.v1": apply_quote, "billing.payment_recorded.v1": write_history}


def relay(poll_interval_seconds: float) -> None:
    """Send what is not sent yet, a hundred rows a transaction, until SIGTERM."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with psycopg.connect(os.environ["DATABASE_URL"], application_name="naive relay") as connection:
        while not stopping.is_set():
            if not relay_batch(connection):
                stopping.wait(poll_interval_seconds)


def relay_batch(connection: Connection) -> int:
    """Send one batch; return how many rows were in it."""
    with connection.transaction():
        rows = connection.execute(_NEXT).fetchall()
        for id, aggregate_type, aggregate_id, event_type, payload, headers, created_at in rows:
            _ACTORS[event_type].send(
                str(id),
                {
                    "type": event_type,
                    "aggregate_type": aggregate_type,
                    "aggregate_id": aggregate_id,
                    "time": created_at.isoformat(),
                    "headers": headers,
                    "data": payload,
                },
            )
        if rows:
            connection.execute(_DONE, ([row[0] for row in rows],))
    return len(rows)


def connection_of_thread() -> Connection:
    connection: Connection | None = getattr(_of_thread, "connection", None)
    if connection is None:
        connection = _of_thread.connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True)
    return connection


if __name__ == "__main__":
    relay(float(os.environ.get("NAIVE_POLL_SECONDS", "1")))
