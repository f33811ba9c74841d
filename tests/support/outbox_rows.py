"""Rows of the outbox as tests write them, and batches as they read them."""

import json

import psycopg
from psycopg.rows import TupleRow

from dovecote.store.positions import multirange
from dovecote.store.reader import Batch, positions

Connection = psycopg.Connection[TupleRow]


def insert(connection: Connection, aggregate: object = "EUR", version: int = 1) -> int:
    """Write one event; return its position."""
    row = connection.execute(
        """
        insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)
        values ('price', %s, 'pricing.price_quoted.v1', %s) returning position
        """,
        (str(aggregate), json.dumps({"price": str(version)})),
    ).fetchone()
    assert row
    return int(row[0])


def positions_in(batch: Batch) -> list[int]:
    return positions(batch.rows)


def record(connection: Connection, batch: Batch, checkpoint: bool = True) -> None:
    """Do what the relay does when a batch is on the queues; the checkpoint may follow later."""
    connection.execute(
        "insert into dovecote.published_batches (positions, events, epoch) values (%s, %s, 1)",
        (multirange(positions_in(batch)), len(batch.rows)),
    )
    if checkpoint:
        connection.execute("update dovecote.relay_state set checkpoint = %s", (batch.checkpoint,))
