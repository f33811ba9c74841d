"""Follow events as they commit. For eyes: nothing is recorded, and nobody is told twice or waits for us."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from dovecote.envelope import payload_of, read_head
from dovecote.envelope.stored_json import read_stored
from dovecote.operations.events import without_numbers
from dovecote.store.connections import connection_parameters
from dovecote.store.reader import Reader


@dataclass(frozen=True)
class Followed:
    """One event as it committed."""

    id: UUID
    position: int
    event_type: str
    aggregate_type: str
    aggregate_id: str
    created_at: datetime
    payload: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def follow(url: str, wait: Callable[[], None]) -> Iterator[Followed]:
    """Yield events as they commit, for ever; `wait` is called whenever there is nothing new.

    It reads as the relay reads, so an event whose transaction ends late is not missed, only late. Events of
    transactions that were at work when it began may be missing.
    """
    parameters = connection_parameters(url, {}, application_name="dovecote events tail")
    # Closed, not rolled back: Ctrl-C may come in the middle of a query.
    with closing(psycopg.connect(autocommit=True, **parameters)) as connection:
        connection.execute("set search_path = pg_catalog, pg_temp; set timezone = 'UTC'")
        connection.execute("set enable_seqscan = off; set jit = off")
        row = connection.execute("select last_position from dovecote.low_watermark()").fetchone()
        assert row is not None
        reader = Reader(connection, row[0], 500)
        while True:
            batch = reader.read()
            for position, event_type, content in batch.rows:
                envelope = read_head(content)
                yield Followed(
                    id=UUID(envelope["id"]),
                    position=position,
                    event_type=event_type,
                    aggregate_type=envelope["source"].rsplit("/", 1)[1],
                    aggregate_id=envelope["subject"],
                    created_at=datetime.fromisoformat(envelope["time"]),
                    payload=without_numbers(read_stored(payload_of(content))),
                )
            if not batch.rows:
                wait()
