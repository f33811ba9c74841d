"""Rows in the outbox as the trigger would refuse them: what a restore or logical replication brings."""

import json

import psycopg
from psycopg.rows import TupleRow


def numbers(exponent: int, count: int) -> str:
    """Return a JSON object with so many numbers 1eEXPONENT, which Postgres keeps in twelve bytes each."""
    return '{"n":[' + ",".join([f"1e{exponent}"] * count) + "]}"


def insert_past_the_trigger(
    connection: psycopg.Connection[TupleRow],
    payload: str,
    *,
    aggregate_type: str = "price",
    aggregate_id: str = "BOMB",
    event_type: str = "pricing.price_quoted.v1",
    headers: str = "{}",
) -> int:
    """Write one event as a replica does, without triggers; return its position."""
    with connection.transaction():
        connection.execute("set local session_replication_role = replica")
        row = connection.execute(
            """
            insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload, headers)
            values (%s, %s, %s, %s::jsonb, %s::jsonb) returning position
            """,
            (aggregate_type, aggregate_id, event_type, payload, headers),
        ).fetchone()
    assert row
    return int(row[0])


def a_document(kilobytes: int) -> str:
    """Return a payload of that many kB that does not compress well."""
    return json.dumps({"document": "".join(f"{n * 2654435761 % 2**32:08x}" for n in range(kilobytes * 125))})
