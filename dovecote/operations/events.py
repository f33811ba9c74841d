"""Events: list them newest first, show one in full, tail them as they commit.

No index serves a filter by type alone, so a page looks at a bounded number of rows and says how far back it got.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import Connection, Engine, text

from dovecote.envelope import payload_of, read_head
from dovecote.envelope.stored_json import read_stored
from dovecote.errors import DovecoteError
from dovecote.masking import masked_payload
from dovecote.operations.retention import require_present
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import WrongRequest, require_aggregate_type, require_range
from dovecote.route import Route
from dovecote.store.connections import connection_parameters
from dovecote.store.reader import Reader

# Rows a page looks at: 50 ms at worst.
_MAX_LOOKED_AT = 20_000


class NoSuchEvent(DovecoteError):
    """The outbox has no event of this id."""


@dataclass(frozen=True)
class EventSelection:
    """A filter of events. None matches everything. An aggregate's id needs its type."""

    event_type: str | None = None
    aggregate_type: str | None = None
    aggregate_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True)
class EventLine:
    """One event and its state for each handler that subscribes to its type.

    handlers  handler -> processed, retrying, waiting, dead, discarded; pending when none of these
    """

    id: UUID
    position: int
    event_type: str
    aggregate_type: str
    aggregate_id: str
    created_at: datetime
    handlers: dict[str, str]


@dataclass(frozen=True)
class EventPage:
    """Newest first.

    before, after   ids to go on from: towards older ones, None at the end; towards newer ones
    looked_back_to  the time the search got to before its limit of rows; None when it came to the end
    """

    events: list[EventLine]
    before: UUID | None
    after: UUID | None
    looked_back_to: datetime | None


@dataclass(frozen=True)
class Outcome:
    """What one handler did with one event: processed, retrying, waiting, dead, discarded, or pending.

    summary  the line of the traceback `error` that names it
    """

    handler: str
    state: str
    processed_at: datetime | None = None
    replay_id: UUID | None = None
    attempts: int = 0
    next_attempt_at: datetime | None = None
    error_type: str | None = None
    error: str | None = None
    summary: str | None = None
    trace_id: str | None = None


@dataclass(frozen=True)
class EventLife:
    """One event in full. The payload is as it is in the row: what is encrypted stays encrypted.

    published_at  when the relay recorded the batch of `batch_events` events it went out with; None before that
    """

    id: UUID
    position: int
    event_type: str
    aggregate_type: str
    aggregate_id: str
    created_at: datetime
    payload: dict[str, Any]
    headers: dict[str, Any]
    published_at: datetime | None
    batch_events: int | None
    epoch: int | None
    handlers: list[Outcome]


@dataclass(frozen=True)
class TailedEvent:
    """One event as it committed."""

    id: UUID
    position: int
    event_type: str
    aggregate_type: str
    aggregate_id: str
    created_at: datetime
    payload: dict[str, Any]


_FOUND = "id, position, event_type, aggregate_type, aggregate_id, created_at"
_RANGE = """
    o.id >= dovecote.uuid_v7_lower_bound(coalesce(cast(:since as timestamptz), 'epoch'))
    and o.id < coalesce(dovecote.uuid_v7_lower_bound(cast(:until as timestamptz)),
                        'ffffffff-ffff-ffff-ffff-ffffffffffff')
"""
# By time along the primary key; one aggregate's events by their own index.
_BY_TIME = "select {columns} from dovecote.outbox o where {range} and o.id {beyond} :cursor order by o.id {order}"
_BY_AGGREGATE = (
    "select {columns} from dovecote.outbox o where o.aggregate_type = :aggregate_type"
    " and o.aggregate_id = :aggregate_id and {range} and o.position {beyond} :cursor order by o.position {order}"
)

_PROCESSED = text(
    "select event_id, handler_name from dovecote.processed_events where event_id = any(cast(:ids as uuid[]))"
)
# The key leads with the handler: one look for each handler and event.
_DELIVERIES = text(
    """
    select d.event_id, d.handler_name, d.state
    from unnest(cast(:handlers as text[]), cast(:ids as uuid[])) as w (handler_name, id)
    join dovecote.deliveries d on d.handler_name = w.handler_name and d.event_id = w.id
    """
)

_EVENT = text(
    f"select {_FOUND}, payload, headers from dovecote.outbox where id = :id"  # noqa: S608 - put together from constants
)
_BATCH = text(
    """
    select published_at, events, epoch from dovecote.published_batches
    where positions @> cast(:position as bigint) order by published_at limit 1
    """
)
_ACTS = text(
    """
    select handler_name, processed_at, replay_id from dovecote.processed_events where event_id = :id
    order by handler_name, processed_at
    """
)
_TROUBLE = text(
    """
    select d.*, left(d.headline, 300) as summary from unnest(cast(:handlers as text[])) as h (name)
    join dovecote.deliveries d on d.handler_name = h.name and d.event_id = :id
    """
)


def list_events(
    engine: Engine,
    routes: Sequence[Route],
    wanted: EventSelection,
    *,
    limit: int = 50,
    before: UUID | None = None,
    after: UUID | None = None,
) -> EventPage:
    """Return events, newest first: those older than `before`, or the next ones newer than `after`.

    Errors: WrongRequest; Archived when the range has been dropped; NoSuchEvent for a cursor of one aggregate that is
    no event.
    """
    require_range(wanted.since, wanted.until)
    require_aggregate_type(wanted.aggregate_type, wanted.aggregate_id)
    if before and after:
        raise WrongRequest("a page goes either --before or --after one event")
    forward = after is not None
    with snapshot(engine) as connection:
        if wanted.since or wanted.until:
            # Without a beginning it is a look back from its end, which goes on for as long as there are events.
            require_present(connection, since=wanted.since or wanted.until, until=wanted.until)
        walk = _Walk(connection, wanted, after or before, forward)
        rows = walk.take(limit)
        ended_early = len(rows) < limit
        looked_back_to, edge = walk.edge() if ended_early else (None, None)
        found = rows[::-1] if forward else rows
        ids = [row.id for row in found]
        states = _states(connection, routes, ids)
    lines = [
        EventLine(
            **row._mapping,
            handlers={
                **{route.handler: "pending" for route in routes if row.event_type in route.event_types},
                **states.get(row.id, {}),
            },
        )
        for row in found
    ]
    # Where the rows to look at ran out, the search goes on from there and not from what it found.
    older = edge if ended_early and not forward else (ids[-1] if ids else None)
    newer = edge if edge and forward else (ids[0] if ids else after)
    return EventPage(lines, older, newer, looked_back_to)


class _Walk:
    """One walk along an index, from a cursor, over a bounded number of rows."""

    def __init__(self, connection: Connection, wanted: EventSelection, cursor: UUID | None, forward: bool) -> None:
        self._connection = connection
        by_aggregate = wanted.aggregate_id is not None
        start: object = UUID(int=0 if forward else 2**128 - 1)
        if by_aggregate:
            start = 0 if forward else 2**63 - 1
        if cursor is not None:
            start = _position_of(connection, cursor) if by_aggregate else cursor
        self._walk = (_BY_AGGREGATE if by_aggregate else _BY_TIME).format(
            columns="{columns}", range=_RANGE, beyond=">" if forward else "<", order="" if forward else "desc"
        )
        self._parameters = {**asdict(wanted), "cursor": start, "looked_at": _MAX_LOOKED_AT}

    def take(self, limit: int) -> Sequence[Any]:
        query = f"""
            select * from ({self._walk.format(columns=_FOUND)} limit :looked_at) looked_at
            where (cast(:event_type as text) is null or event_type = :event_type)
              and (cast(:aggregate_type as text) is null or aggregate_type = :aggregate_type)
            limit :limit
        """  # noqa: S608 - put together from constants
        return self._connection.execute(text(query), {**self._parameters, "limit": limit}).all()

    def edge(self) -> tuple[datetime | None, UUID | None]:
        """Return time and id of the last row within the limit; None when there are no more rows than that."""
        query = f"{self._walk.format(columns='o.id, dovecote.uuid_v7_time(o.id) as at')} offset :looked_at - 1 limit 1"
        row = self._connection.execute(text(query), self._parameters).one_or_none()
        return (row.at, row.id) if row else (None, None)


def _position_of(connection: Connection, event_id: UUID) -> int:
    found = connection.execute(text("select position from dovecote.outbox where id = :id"), {"id": event_id})
    position = found.scalar_one_or_none()
    if position is None:
        raise NoSuchEvent(f"there is no event {event_id} to go on from")
    return int(position)


def _states(connection: Connection, routes: Sequence[Route], ids: Sequence[UUID]) -> dict[UUID, dict[str, str]]:
    states: dict[UUID, dict[str, str]] = {}
    for event_id, handler in connection.execute(_PROCESSED, {"ids": ids}):
        states.setdefault(event_id, {})[handler] = "processed"
    pairs = [(route.handler, event_id) for route in routes for event_id in ids]
    parameters = {"handlers": [handler for handler, _ in pairs], "ids": [event_id for _, event_id in pairs]}
    for event_id, handler, state in connection.execute(_DELIVERIES, parameters):
        states.setdefault(event_id, {})[handler] = state
    return states


def get_event(engine: Engine, routes: Sequence[Route], event_id: UUID) -> EventLife:
    """Return one event in full. Errors: NoSuchEvent; Archived when its week was dropped."""
    with snapshot(engine) as connection:
        row = connection.execute(_EVENT, {"id": event_id}).one_or_none()
        if row is None:
            _refuse(connection, event_id)
            raise NoSuchEvent(f"there is no event {event_id}: it was never committed, or somebody mistyped it")
        batch = connection.execute(_BATCH, {"position": row.position}).one_or_none()
        acts = connection.execute(_ACTS, {"id": event_id}).all()
        wanting = [route.handler for route in routes if row.event_type in route.event_types]
        handlers = list(dict.fromkeys([*wanting, *(act.handler_name for act in acts)]))
        trouble = connection.execute(_TROUBLE, {"handlers": handlers, "id": event_id}).all()
    outcomes = [
        *(Outcome(act.handler_name, "processed", act.processed_at, act.replay_id) for act in acts),
        *(
            Outcome(
                one.handler_name,
                one.state,
                attempts=one.attempts,
                next_attempt_at=one.next_attempt_at,
                error_type=one.error_type,
                error=one.error,
                summary=one.summary,
                trace_id=one.trace_id,
            )
            for one in trouble
        ),
    ]
    known = {outcome.handler for outcome in outcomes}
    outcomes += [Outcome(handler, "pending") for handler in handlers if handler not in known]
    return EventLife(
        **{**row._mapping, "payload": without_numbers(row.payload), "headers": without_numbers(row.headers)},
        published_at=batch.published_at if batch else None,
        batch_events=batch.events if batch else None,
        epoch=batch.epoch if batch else None,
        handlers=outcomes,
    )


def tail_events(url: str, wait: Callable[[], None]) -> Iterator[TailedEvent]:
    """Yield events as they commit, for ever; `wait` is called whenever there is nothing new. Nothing is recorded.

    It reads as the relay reads, so an event whose transaction ends late is not missed, only late. Events of
    transactions that were open when it began may be missing.
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
                yield TailedEvent(
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


def _refuse(connection: Connection, event_id: UUID) -> None:
    if event_id.version == 7:
        at = connection.execute(text("select dovecote.uuid_v7_time(:id)"), {"id": event_id}).scalar_one()
        require_present(connection, since=at, until=at)


def without_numbers(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON with phone numbers masked."""
    # A foreign writer may have put one into its payload in the clear.
    return masked_payload(value)
