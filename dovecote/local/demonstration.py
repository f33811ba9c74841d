"""Write events of an application and wait until its handlers have processed every one."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text

from dovecote.database import Sessions
from dovecote.events.ids import uuid7
from dovecote.store.connections import sessions_for
from dovecote.unit_of_work import UnitOfWork, unit_of_work

_PER_TRANSACTION = 20

#: Writes exactly one event.
UseCase = Callable[[UnitOfWork, datetime], None]
#: Gets how many events are written and how many processed.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """What became of the events.

    processed   events a handler has processed
    lost        events that are, after the wait, neither processed nor known as retrying, waiting or dead
    duplicated  effects beyond one per event
    """

    written: int
    published: int
    processed: int
    lost: int
    duplicated: int
    seconds: float

    @property
    def is_sound(self) -> bool:
        return self.lost == 0 and self.duplicated == 0 and self.processed == self.written

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Demonstration:
    """One run of a demo on a database. Its events have `run_id` as their correlation id."""

    engine: Engine
    run_id: UUID
    after: int

    @classmethod
    def begin(cls, engine: Engine) -> "Demonstration":
        with engine.connect() as connection:
            last = connection.execute(text("select last_position from dovecote.low_watermark()")).scalar_one()
        return cls(engine, uuid7(), int(last))

    def run(
        self,
        use_cases: Iterator[UseCase],
        events: int,
        *,
        timeout_seconds: float,
        progress: Progress = lambda _written, _processed: None,
        count_duplicates: Callable[[], int] = lambda: 0,
    ) -> Report:
        """Write `events` events and wait until all are processed, at most `timeout_seconds`."""
        sessions = sessions_for(self.engine)
        began = time.monotonic()
        written = 0
        while written < events:
            written += self._write(sessions, list(islice(use_cases, min(_PER_TRANSACTION, events - written))))
            progress(written, 0)
        deadline = time.monotonic() + timeout_seconds
        while (processed := self.count(_PROCESSED)) < written and time.monotonic() < deadline:
            progress(written, processed)
            time.sleep(0.05)  # the database is polled: it has no notification for this
        progress(written, processed)
        return Report(
            written=written,
            published=self.count(_PUBLISHED),
            processed=processed,
            lost=max(0, written - processed - self.count(_ON_THEIR_WAY)),
            duplicated=count_duplicates(),
            seconds=round(time.monotonic() - began, 3),
        )

    def count(self, query: str) -> int:
        """Return the number that a query of one's own gives; `:run_id` and `:after` are its parameters."""
        with self.engine.connect() as connection:
            parameters = {"run_id": str(self.run_id), "after": self.after}
            return int(connection.execute(text(query), parameters).scalar_one() or 0)

    def _write(self, sessions: Sessions, use_cases: list[UseCase]) -> int:
        with unit_of_work(sessions, headers={"correlation_id": str(self.run_id)}) as uow:
            for use_case in use_cases:
                use_case(uow, datetime.now(UTC))
        return len(use_cases)


#: The events of the run, for a query.
EVENTS_OF_RUN = """
    from dovecote.outbox o
    where o.position > :after and o.headers ->> 'correlation_id' = cast(:run_id as text)
"""
_PUBLISHED = f"""
    select count(*) {EVENTS_OF_RUN}
      and exists (select from dovecote.published_batches b where b.positions @> o.position)
"""  # noqa: S608 - put together from constants
_PROCESSED = f"""
    select count(*) {EVENTS_OF_RUN} and exists (select from dovecote.processed_events p where p.event_id = o.id)
"""  # noqa: S608 - put together from constants
_ON_THEIR_WAY = f"""
    select count(*) {EVENTS_OF_RUN} and exists (select from dovecote.deliveries d where d.event_id = o.id)
"""  # noqa: S608 - put together from constants
