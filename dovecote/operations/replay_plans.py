"""Requests for replays: code validates what only code knows; the database counts and starts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, CursorResult

from dovecote.errors import DovecoteError
from dovecote.events.ids import made_at
from dovecote.operations import retention
from dovecote.operations.validation import WrongRequest, require_aggregate_type, require_handler, require_range
from dovecote.route import Route
from dovecote.store.replays import Mode, ReplaySelection

#: The dry run counts exactly, however many there are; a table of 10 million events takes some seconds.
_COUNT_TIMEOUT_MS = 600_000
MAX_SINGLE_EVENTS = 100_000


class ReplayRefused(DovecoteError):
    """This request cannot be replayed; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for a replay. `rate` is in events a second; None is unlimited."""

    handler: str
    mode: Mode
    filter: ReplaySelection = field(default_factory=ReplaySelection)
    event_ids: Sequence[UUID] | None = None
    rate: int | None = None
    reason: str
    actor: str


@dataclass(frozen=True)
class SampleEvent:
    event_id: UUID
    position: int
    event_type: str
    aggregate_type: str
    aggregate_id: str
    created_at: datetime


@dataclass(frozen=True)
class Plan:
    """What a replay would do.

    events       exactly so many match
    left_alone   events that match the filter and are in `deliveries`: those are retried or discarded there
    replay_id    None for a dry run
    """

    handler: str
    mode: Mode
    events: int
    left_alone: int
    first_position: int
    last_position: int
    sample: list[SampleEvent]
    replay_id: UUID | None = None


_REQUEST = """
    %(handler)s, %(mode)s, %(filter)s::jsonb, %(event_types)s::text[], %(event_ids)s::uuid[]
"""
_PLAN = f"""
    select null::uuid as id, asked_at, events, left_alone, first_position, last_position, event_types
    from dovecote.plan_replay({_REQUEST}, %(keeps_order)s)
"""  # noqa: S608 - put together from constants
_START = f"""
    select id, asked_at, events, left_alone, first_position, last_position, counted_types as event_types
    from dovecote.start_replay(%(actor)s, %(reason)s, {_REQUEST}, %(rate)s::integer, %(keeps_order)s)
"""  # noqa: S608 - put together from constants
# The same events that the functions count.
_FIRST = """
    select o.id as event_id, o.position, o.event_type, o.aggregate_type, o.aggregate_id, o.created_at
    from dovecote.outbox o
    left join dovecote.processed_events p on p.event_id = o.id and p.handler_name = %(handler)s
    left join dovecote.deliveries d on d.event_id = o.id and d.handler_name = %(handler)s
    where dovecote.is_asked(o, %(filter)s::jsonb, %(event_types)s::text[], %(event_ids)s::uuid[])
      and dovecote.is_replayed(%(mode)s::text, p, d, %(asked_at)s::timestamptz)
    order by o.position limit 5
"""

_ABSENT = """
    select wanted.id from unnest(%(event_ids)s::uuid[]) as wanted (id)
    where not exists (select from dovecote.outbox o where o.id = wanted.id)
"""


def planned(connection: Connection, routes: Sequence[Route], request: Request, *, start: bool) -> Plan:
    """Count exactly what the replay would do; with `start` have the relay do it, in the connection's transaction.

    Errors: WrongRequest, ReplayRefused; DBAPIError with what the database refuses.
    """
    route = _route(routes, request)
    _require_present(connection, request)
    run(connection, f"set local statement_timeout = {_COUNT_TIMEOUT_MS}")
    fields = {
        "actor": request.actor,
        "reason": request.reason,
        "handler": route.handler,
        "mode": request.mode,
        "filter": json.dumps(request.filter.as_json()),
        "event_types": route.event_types,
        "event_ids": list(request.event_ids) if request.event_ids else None,
        "rate": request.rate,
        "keeps_order": route.ordered,
    }
    found = run(connection, _START if start else _PLAN, fields).one()
    fields |= {"event_types": found.event_types, "asked_at": found.asked_at}
    return Plan(
        handler=route.handler,
        mode=request.mode,
        events=found.events,
        left_alone=found.left_alone,
        first_position=found.first_position,
        last_position=found.last_position,
        sample=[SampleEvent(**row) for row in run(connection, _FIRST, fields).mappings()],
        replay_id=found.id,
    )


def _require_present(connection: Connection, request: Request) -> None:
    """Refuse dropped events, with the name of their archive, and unknown ids."""
    asked = request.filter
    retention.require_present(
        connection,
        since=asked.since,
        until=asked.until,
        after_position=None if asked.from_position is None else asked.from_position - 1,
        upto_position=asked.upto_position,
    )
    if not request.event_ids:
        return
    absent: list[UUID] = list(run(connection, _ABSENT, {"event_ids": list(request.event_ids)}).scalars())
    times = [made_at(id) for id in absent if id.version == 7]
    if times:
        retention.require_present(connection, since=min(times), until=max(times) + timedelta(milliseconds=1))
    if absent:
        raise ReplayRefused(f"{len(absent)} of these events are not in the outbox, such as {absent[0]}")


def _route(routes: Sequence[Route], request: Request) -> Route:
    require_handler(request.handler, routes)
    route = next(route for route in routes if route.handler == request.handler)
    for event_type in request.filter.event_types or ():
        if event_type not in route.event_types:
            raise WrongRequest(f"{route.handler} does not take {event_type!r}; it takes {', '.join(route.event_types)}")
    asked = request.filter
    require_range(asked.since, asked.until)
    require_aggregate_type(asked.aggregate_type, asked.aggregate_id)
    if asked.from_position and asked.upto_position and asked.from_position > asked.upto_position:
        raise WrongRequest(
            f"the range of positions ends ({asked.upto_position}) before it begins ({asked.from_position})"
        )
    if request.event_ids is not None and not 0 < len(request.event_ids) <= MAX_SINGLE_EVENTS:
        raise WrongRequest(f"1 to {MAX_SINGLE_EVENTS:,} event ids are taken, got {len(request.event_ids):,}")
    if request.rate is not None and request.rate < 1:
        raise WrongRequest(f"the rate is in events a second, at least 1; got {request.rate}")
    if request.mode == "reprocess" and not route.replayable:
        raise ReplayRefused(f"{route.handler} may not act again: {route.replay_note}; --mode backfill is possible")
    return route


def run(connection: Connection, query: str, fields: Mapping[str, Any] | None = None) -> CursorResult[Any]:
    """Execute through the driver: the relay uses the same SQL on a connection without SQLAlchemy."""
    return connection.exec_driver_sql(query, dict(fields or {}))
