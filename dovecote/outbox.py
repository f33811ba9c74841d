"""The outbox table and the one statement a writer needs.

Append only. A row is written in the transaction of the change that it records; the trigger `announce`
on the table announces to the relay that positions are about to be taken.
Do not write into a partition directly: that would bypass the trigger, and the database refuses it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Index,
    Table,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy import (
    Sequence as PositionSequence,
)
from sqlalchemy.dialects.postgresql import JSONB

from dovecote.database import array, metadata
from dovecote.errors import InvalidEvent, shown_error
from dovecote.events import Event
from dovecote.privacy import Keyring

# Bytes of JSON text, as Postgres prints it: ", " and ": " between its parts. The database takes as much of a payload,
# and 16,384 bytes of headers, so that those of a trace (unit_of_work/trace_headers.py) fit beside the service's own.
# A float in exponent form is the one thing that is longer there (1e300 has 301 digits); then the database refuses it.
MAX_PAYLOAD_BYTES = 262_144
MAX_HEADER_BYTES = 8_192
MAX_AGGREGATE_ID_CHARACTERS = 200

outbox = Table(
    "outbox",
    metadata,
    Column("id", Uuid, primary_key=True, server_default=func.dovecote.uuid_v7()),
    Column(
        "position",
        BigInteger,
        PositionSequence("outbox_position", metadata=metadata),
        nullable=False,
        server_default=text("nextval('dovecote.outbox_position')"),
    ),
    Column("aggregate_type", Text, nullable=False),
    Column("aggregate_id", Text, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("headers", JSONB, nullable=False, server_default=text("'{}'")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    Index("outbox_position_idx", "position"),
    Index("outbox_aggregate_idx", "aggregate_type", "aggregate_id", "position"),
    postgresql_partition_by="RANGE (id)",
)

_COLUMNS = ("id", "aggregate_type", "aggregate_id", "event_type", "payload", "headers")
_APPEND_ONE = """
    insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (%s, %s, %s, %s, %s, %s)
"""
# One statement for any number of events: the trigger fires once, and unnest keeps their order.
_APPEND = """
    insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers)
    select * from unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::jsonb[], %s::jsonb[])
"""


def append(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows made by `row_for`, in this order, in the connection's transaction."""
    # Past the ORM, which would cost a writer as much as the statement itself.
    if len(rows) == 1:
        connection.exec_driver_sql(_APPEND_ONE, tuple(rows[0][name] for name in _COLUMNS))
    else:
        connection.exec_driver_sql(_APPEND, tuple(array(row[name] for row in rows) for name in _COLUMNS))


def row_for(
    event: Event,
    headers: Mapping[str, str],
    keys: Keyring | None = None,
    trace: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the outbox row of an event, checked. `headers` win over those of the `trace`, which count for no limit.

    Errors: InvalidEvent when the outbox would refuse it: too large, not JSON, an aggregate without an id.
    """
    aggregate_id = event.aggregate_id
    if not 1 <= len(aggregate_id) <= MAX_AGGREGATE_ID_CHARACTERS:
        raise InvalidEvent(
            f"{event.type} {event.event_id}: the aggregate's id must have 1 to "
            f"{MAX_AGGREGATE_ID_CHARACTERS} characters, got {len(aggregate_id)}"
        )
    if event.event_id.version != 7:
        raise InvalidEvent(f"{event.type}: event_id {event.event_id} is not a UUIDv7; leave it out")
    return {
        "id": event.event_id,
        "aggregate_type": event.aggregate_type,
        "aggregate_id": _without_nul(event, "the aggregate's id", aggregate_id, "\x00"),
        "event_type": event.type,
        "payload": _json(event, "payload", event.payload(keys), MAX_PAYLOAD_BYTES),
        "headers": _headers(event, headers, trace or {}),
    }


def _headers(event: Event, headers: Mapping[str, str], trace: Mapping[str, str]) -> str:
    own = _json(event, "headers", dict(headers), MAX_HEADER_BYTES)
    return json.dumps({**trace, **headers}, ensure_ascii=False) if trace else own


def _json(event: Event, part: str, value: object, max_bytes: int) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidEvent(f"{event.type} {event.event_id}: {part} is not JSON: {shown_error(error)}") from error
    if size > max_bytes:
        raise InvalidEvent(
            f"{event.type} {event.event_id}: {part} has {size} bytes, at most {max_bytes} are taken; "
            "store the bulk elsewhere and put a reference into the event"
        )
    _without_nul(event, part, text.replace("\\\\", ""), "\\u0000")
    return text


def _without_nul(event: Event, part: str, text: str, nul: str) -> str:
    # Postgres keeps none in text or jsonb, however it is written.
    if nul in text:
        raise InvalidEvent(f"{event.type} {event.event_id}: {part} contains a NUL character")
    return text
