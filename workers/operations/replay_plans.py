"""What an operator asks to replay, and what that would do: checked and counted, before anything is started."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import Connection, CursorResult

from domain.errors import DovecoteError
from domain.ids import made_at
from workers.operations import retention
from workers.operations.asking import WrongRequest, require_aggregate_type, require_handler, require_range
from workers.relay.positions import multirange
from workers.replays import KNOWN, Filter, Strength, is_matched
from workers.routes import Route

#: The dry run counts exactly, however many there are; a table of 10 million events takes some seconds.
_COUNT_TIMEOUT_MS = 600_000
_SAMPLE = 5
MOST_SINGLE_EVENTS = 100_000


class ReplayRefused(DovecoteError):
    """It cannot be replayed like this; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What an operator asks for. `rate` is in events a second, None for as fast as they are acted on."""

    handler: str
    strength: Strength
    filter: Filter = field(default_factory=Filter)
    event_ids: Sequence[UUID] | None = None
    rate: int | None = None
    reason: str
    requested_by: str


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
    strength: Strength
    events: int
    left_alone: int
    first_position: int
    last_position: int
    sample: list[SampleEvent]
    replay_id: UUID | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_COUNT = """
    select count(*) as events, min(o.position) as first_position, max(o.position) as last_position
    from dovecote.outbox o {known} where {conditions} and {matched}
"""

_LEFT_ALONE = """
    select count(*) from dovecote.deliveries left_alone join dovecote.outbox o on o.id = left_alone.event_id
    where left_alone.handler_name = %(handler)s and {conditions}
"""

_FIRST = """
    select o.id as event_id, o.position, o.event_type, o.aggregate_type, o.aggregate_id, o.created_at
    from dovecote.outbox o {known} where {conditions} and {matched} order by o.position limit %(limit)s
"""

# The handler began here: what lies at or below, but for gaps, was published before it wanted to know.
_BEFORE_ITS_TIME = """
    select greatest(s.since_position, upper(s.published_above) - 1) from dovecote.subscriptions s
    where s.handler_name = %(handler)s and s.event_type = any(%(event_types)s)
      and exists (select from dovecote.outbox o {known}
                  where {conditions} and {matched} and o.event_type = s.event_type
                    and (o.position <= s.since_position or s.published_above @> o.position))
    order by 1 desc limit 1
"""

_ABSENT = """
    select wanted.id from unnest(%(event_ids)s::uuid[]) as wanted (id)
    where not exists (select from dovecote.outbox o where o.id = wanted.id)
"""


class Counted(NamedTuple):
    """The plan, when it was counted, and the positions of single events as a multirange, or None."""

    plan: Plan
    asked_at: datetime
    positions: str | None


def counted(connection: Connection, routes: Sequence[Route], request: Request) -> Counted:
    """Count exactly what the replay would do.

    Errors: WrongRequest, ReplayRefused.
    """
    route = _route(routes, request)
    _require_present(connection, request)
    run(connection, f"set local statement_timeout = {_COUNT_TIMEOUT_MS}")
    asked_at: datetime = run(connection, "select clock_timestamp()").scalar_one()
    fields = {
        **request.filter.parameters(route.handler, route.event_types),
        "asked_at": asked_at,
        "replay": None,
        "event_ids": list(request.event_ids or ()),
        "limit": _SAMPLE,
    }
    words = {
        "known": KNOWN,
        "conditions": request.filter.conditions() + (" and o.id = any(%(event_ids)s)" if request.event_ids else ""),
        "matched": is_matched(request.strength),
    }
    found = run(connection, _COUNT.format(**words), fields).one()
    left_alone = run(connection, _LEFT_ALONE.format(**words), fields).scalar_one()
    if not found.events:
        raise ReplayRefused(_nothing(request, left_alone))
    if route.ordered and request.strength == "missing":
        since = run(connection, _BEFORE_ITS_TIME.format(**words), fields).scalar()
        if since is not None:
            raise ReplayRefused(
                f"{route.handler} keeps the order of each aggregate and has its events from position {since + 1} on: "
                f"what is before cannot be told in order any more; ask with --from-position {since + 1}"
            )
    positions = None
    if request.event_ids:
        query = "select o.position from dovecote.outbox o {known} where {conditions} and {matched} order by 1"
        positions = multirange(list(run(connection, query.format(**words), fields).scalars()))
    sample = [SampleEvent(**row) for row in run(connection, _FIRST.format(**words), fields).mappings()]
    plan = Plan(
        handler=route.handler,
        strength=request.strength,
        events=found.events,
        left_alone=left_alone,
        first_position=found.first_position,
        last_position=found.last_position,
        sample=sample,
    )
    return Counted(plan, asked_at, positions)


def _require_present(connection: Connection, request: Request) -> None:
    """Refuse what was dropped, with the name of its archive, and ids that never were."""
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
    moments = [made_at(id) for id in absent if id.version == 7]
    if moments:
        retention.require_present(connection, since=min(moments), until=max(moments) + timedelta(milliseconds=1))
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
    if request.event_ids is not None and not 0 < len(request.event_ids) <= MOST_SINGLE_EVENTS:
        raise WrongRequest(f"1 to {MOST_SINGLE_EVENTS:,} event ids are taken, got {len(request.event_ids):,}")
    if request.rate is not None and request.rate < 1:
        raise WrongRequest(f"the rate is in events a second, at least 1; got {request.rate}")
    if request.strength == "again" and not route.replayable:
        raise ReplayRefused(f"{route.handler} may not act again: {route.replay_note}; --strength missing is possible")
    return route


def _nothing(request: Request, left_alone: int) -> str:
    known = {
        "missing": f"{request.handler} has acted on all that match",
        "again": f"{request.handler} has acted on none that match",
    }[request.strength]
    there = f"; {left_alone} are in deliveries: see `dovecote deliveries`" if left_alone else ""
    return f"there is nothing to replay: no event matches, or {known}{there}"


def run(connection: Connection, query: str, fields: Mapping[str, Any] | None = None) -> CursorResult[Any]:
    """Execute in the driver's own words: the relay asks with the same SQL on a connection without SQLAlchemy."""
    return connection.exec_driver_sql(query, dict(fields or {}))
