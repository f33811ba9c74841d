"""How values of our tables become Python objects in the relay and in commands, whatever they are.

psycopg raises where a value has no Python object: a time beyond the year 9999 or before 1, `infinity`, a JSON number
of 5,000 digits, a JSON array 10,000 levels deep. Postgres takes all of these, and one row must neither end a relay nor
hide the other rows of a list.
"""

from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg.abc import Buffer
from psycopg.types.datetime import TimestamptzBinaryLoader, TimestamptzLoader
from psycopg.types.json import JsonbBinaryLoader, JsonBinaryLoader, JsonbLoader, JsonLoader
from sqlalchemy import Engine, event

_EARLIEST = datetime.min.replace(tzinfo=UTC)
_LATEST = datetime.max.replace(tzinfo=UTC)
_MAX_SHOWN = 200


class _Timestamp(TimestamptzLoader):
    def load(self, data: Buffer) -> datetime:
        try:
            return super().load(data)
        except (psycopg.DataError, ValueError, OverflowError):
            text = bytes(data)
            return _EARLIEST if text.startswith(b"-") or text.endswith(b"BC") else _LATEST


class _BinaryTimestamp(TimestamptzBinaryLoader):
    def load(self, data: Buffer) -> datetime:
        try:
            return super().load(data)
        except (psycopg.DataError, ValueError, OverflowError):
            return _EARLIEST if bytes(data)[0] & 0x80 else _LATEST


def _unreadable(data: Buffer) -> dict[str, str]:
    return {"unreadable": bytes(data)[:_MAX_SHOWN].decode(errors="replace")}


class _Json(JsonLoader):
    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data)
        except (ValueError, RecursionError):
            return _unreadable(data)


class _BinaryJson(JsonBinaryLoader):
    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data)
        except (ValueError, RecursionError):
            return _unreadable(data)


class _Jsonb(JsonbLoader):
    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data)
        except (ValueError, RecursionError):
            return _unreadable(data)


class _BinaryJsonb(JsonbBinaryLoader):
    def load(self, data: Buffer) -> Any:
        try:
            return super().load(data)
        except (ValueError, RecursionError):
            return _unreadable(bytes(data)[1:])


def load_anything(connection: psycopg.Connection[Any]) -> None:
    """Have the connection return the nearest time, or {"unreadable": <beginning>}, instead of raising."""
    for name, loader in (
        ("timestamptz", _Timestamp),
        ("timestamptz", _BinaryTimestamp),
        ("json", _Json),
        ("json", _BinaryJson),
        ("jsonb", _Jsonb),
        ("jsonb", _BinaryJsonb),
    ):
        connection.adapters.register_loader(name, loader)


def loads_anything(engine: Engine) -> Engine:
    """Do the same for each connection that the engine makes from now on."""

    @event.listens_for(engine, "connect")
    def connected(connection: psycopg.Connection[Any], _record: object) -> None:
        load_anything(connection)

    return engine
