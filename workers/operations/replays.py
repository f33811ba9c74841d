"""Start, look at, pause, resume and cancel replays. The relay does the work (workers/relay/replaying.py)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from sqlalchemy import Connection, CursorResult, Engine, RowMapping
from sqlalchemy.exc import IntegrityError

from domain.errors import DovecoteError
from domain.ids import made_at
from workers import replays
from workers.operations import retention
from workers.operations.asking import (
    WrongRequest,
    require_aggregate_type,
    require_handler,
    require_range,
    require_who_and_why,
)
from workers.operations.audit import record
from workers.operations.reading import snapshot
from workers.relay.positions import multirange
from workers.replays import KNOWN, Filter, Strength, is_matched
from workers.routes import Route

#: The dry run counts exactly, however many there are; a table of 10 million events takes some seconds.
_COUNT_TIMEOUT_MS = 600_000
_SAMPLE = 5
MOST_SINGLE_EVENTS = 100_000
#: An event that is not settled for so long means that nobody acts.
STALLED_SECONDS = 10.0


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


@dataclass(frozen=True)
class Replay:
    """How a replay stands.

    done     events settled: acted on, or in `deliveries`
    acted    events acted on
    events_per_second  since it began; None before the first wave
    stalled_seconds    how long no event has been settled although it runs; None while all is well
    handler_is_paused  it waits until its handler is resumed
    """

    id: UUID
    handler: str
    strength: Strength
    filter: dict[str, Any]
    state: str
    total: int
    done: int
    retrying: int
    waiting: int
    dead: int
    discarded: int
    rate: int | None
    requested_by: str
    reason: str
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    events_per_second: float | None
    stalled_seconds: float | None
    handler_is_paused: bool

    @property
    def acted(self) -> int:
        return max(0, self.done - self.retrying - self.waiting - self.dead - self.discarded)

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "cancelled")

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "acted": self.acted}


@dataclass(frozen=True)
class ReplayPage:
    """Replays, the newest first; `before` is the id to go on from, None at the end."""

    replays: list[Replay]
    before: UUID | None

    def as_json(self) -> dict[str, Any]:
        return {"replays": [replay.as_json() for replay in self.replays], "before": self.before}


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

# The handler began here: what lies at or below was told before it wanted to know.
_BEFORE_ITS_TIME = """
    select s.since_position from dovecote.subscriptions s
    where s.handler_name = %(handler)s and s.event_type = any(%(event_types)s)
      and exists (select from dovecote.outbox o {known}
                  where {conditions} and {matched} and o.event_type = s.event_type
                    and o.position <= s.since_position)
    order by 1 desc limit 1
"""

_ABSENT = """
    select wanted.id from unnest(%(event_ids)s::uuid[]) as wanted (id)
    where not exists (select from dovecote.outbox o where o.id = wanted.id)
"""

_START = """
    insert into dovecote.replays (requested_by, reason, strength, handler_name, filter, total, cursor_position,
                                  upto_position, positions, rate, created_at, updated_at)
    values (%(requested_by)s, %(reason)s, %(strength)s, %(handler)s, %(filter)s::jsonb, %(total)s, %(cursor)s,
            %(upto)s, %(positions)s::int8multirange, %(rate)s, %(asked_at)s, %(asked_at)s)
    returning id
"""

_ACTIVE = """
    select id, state from dovecote.replays
    where handler_name = %(handler)s and state in ('pending', 'running', 'paused')
"""

_LIST = """
    select r.id, r.handler_name as handler, r.strength, r.filter, r.state, coalesce(r.total, 0) as total, r.done,
           r.rate, r.requested_by, r.reason, r.created_at, r.updated_at, r.finished_at, f.*,
           r.done / nullif(extract(epoch from r.updated_at - r.created_at), 0)::float8 as events_per_second,
           case when r.state in ('pending', 'running')
                     and clock_timestamp() - r.updated_at > make_interval(secs => %(stalled)s)
                then extract(epoch from clock_timestamp() - r.updated_at)::float8 end as stalled_seconds,
           exists (select from dovecote.paused_handlers h where h.handler_name = r.handler_name) as handler_is_paused
    from dovecote.replays r
    cross join lateral (
        select count(*) filter (where d.state = 'retrying') as retrying,
               count(*) filter (where d.state = 'waiting') as waiting,
               count(*) filter (where d.state = 'dead') as dead,
               count(*) filter (where d.state = 'discarded') as discarded
        from dovecote.deliveries d where d.replay_id = r.id
    ) f
    where (%(id)s::uuid is null or r.id = %(id)s) and (%(before)s::uuid is null or r.id < %(before)s)
      and (%(handler)s::text is null or r.handler_name = %(handler)s)
    order by r.id desc limit %(limit)s
"""

_CHANGE = """
    update dovecote.replays
    set state = %(to)s, updated_at = clock_timestamp(),
        finished_at = case when %(to)s = 'cancelled' then clock_timestamp() end
    where id = %(id)s and state = any(%(from)s)
    returning done, total
"""

_FORGET_RETRIES = "delete from dovecote.deliveries where replay_id = %(id)s and state in ('retrying', 'waiting')"


def plan(engine: Engine, routes: Sequence[Route], request: Request) -> Plan:
    """Return what the replay would do, and do nothing.

    Errors: WrongRequest, ReplayRefused.
    """
    with engine.connect() as connection:
        return _counted(connection, routes, request).plan


def start(engine: Engine, routes: Sequence[Route], request: Request) -> Plan:
    """Have the relay do it; return what it will do and the replay's id.

    Errors: WrongRequest, ReplayRefused.
    """
    why = "a replay needs a reason: it is written into the audit log"
    require_who_and_why(request.requested_by, request.reason, why=why)
    try:
        with engine.begin() as connection:
            counted = _counted(connection, routes, request)
            asked = {**request.filter.as_json(), **_told(request)}
            started = _run(
                connection,
                _START,
                {
                    "requested_by": request.requested_by,
                    "reason": request.reason,
                    "strength": request.strength,
                    "handler": request.handler,
                    "filter": json.dumps(request.filter.as_json()),
                    "total": counted.plan.events,
                    "cursor": counted.plan.first_position - 1,
                    "upto": counted.plan.last_position,
                    "positions": counted.positions,
                    "rate": request.rate,
                    "asked_at": counted.asked_at,
                },
            ).one()
            details = {
                "replay": str(started.id),
                "handler": request.handler,
                "strength": request.strength,
                "filter": asked,
                "rate": request.rate,
            }
            record(
                connection,
                actor=request.requested_by,
                action="replay.start",
                reason=request.reason,
                affected=counted.plan.events,
                details=details,
            )
            _tell_relay(connection)
    except IntegrityError as error:
        if isinstance(error.orig, psycopg.errors.UniqueViolation):
            raise _is_busy(engine, request.handler) from None
        raise
    return Plan(**{**vars(counted.plan), "replay_id": started.id})


def listed(
    engine: Engine,
    *,
    routes: Sequence[Route] = (),
    handler: str | None = None,
    before: UUID | None = None,
    limit: int = 50,
) -> ReplayPage:
    """Return replays, the newest first; `before` is a page's `before`.

    Errors: WrongRequest for a handler that is neither in `routes` nor was ever replayed.
    """
    with snapshot(engine) as connection:
        found = _replays(connection, handler=handler, before=before, limit=limit + 1)
    if not found:
        require_handler(handler, routes)
    return ReplayPage(found[:limit], found[limit - 1].id if len(found) > limit else None)


def shown(engine: Engine, id: UUID) -> Replay:
    """Return one replay.

    Errors: ReplayRefused when there is none.
    """
    with engine.connect() as connection:
        return _replay(connection, id)


def pause(engine: Engine, id: UUID, *, by: str, reason: str | None = None, dry_run: bool = False) -> Replay:
    """Have the relay send no more of it; what is on the queue is still acted on.

    Errors: ReplayRefused when it does not run.
    """
    return _change(engine, id, "pause", ("pending", "running"), "paused", by, reason, dry_run)


def resume(engine: Engine, id: UUID, *, by: str, reason: str | None = None, dry_run: bool = False) -> Replay:
    """Go on from where it was paused.

    Errors: ReplayRefused when it is not paused.
    """
    return _change(engine, id, "resume", ("paused",), "running", by, reason, dry_run)


def cancel(engine: Engine, id: UUID, *, by: str, reason: str | None = None, dry_run: bool = False) -> Replay:
    """End it: nothing more is sent, and its retries are forgotten. What was acted on stays.

    Errors: ReplayRefused when it is over.
    """
    return _change(engine, id, "cancel", ("pending", "running", "paused"), "cancelled", by, reason, dry_run)


# Counting ------------------------------------------------------------------------------------------


class _Counted(NamedTuple):
    plan: Plan
    asked_at: datetime
    positions: str | None


def _counted(connection: Connection, routes: Sequence[Route], request: Request) -> _Counted:
    route = _route(routes, request)
    _require_present(connection, request)
    _run(connection, f"set local statement_timeout = {_COUNT_TIMEOUT_MS}")
    asked_at: datetime = _run(connection, "select clock_timestamp()").scalar_one()
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
    found = _run(connection, _COUNT.format(**words), fields).one()
    left_alone = _run(connection, _LEFT_ALONE.format(**words), fields).scalar_one()
    if not found.events:
        raise ReplayRefused(_nothing(request, left_alone))
    if route.ordered and request.strength == "missing":
        since = _run(connection, _BEFORE_ITS_TIME.format(**words), fields).scalar()
        if since is not None:
            raise ReplayRefused(
                f"{route.handler} keeps the order of each aggregate and has its events from position {since + 1} on: "
                f"what is before cannot be told in order any more; ask with --from-position {since + 1}"
            )
    positions = None
    if request.event_ids:
        query = "select o.position from dovecote.outbox o {known} where {conditions} and {matched} order by 1"
        positions = multirange(list(_run(connection, query.format(**words), fields).scalars()))
    sample = [SampleEvent(**row) for row in _run(connection, _FIRST.format(**words), fields).mappings()]
    plan = Plan(
        handler=route.handler,
        strength=request.strength,
        events=found.events,
        left_alone=left_alone,
        first_position=found.first_position,
        last_position=found.last_position,
        sample=sample,
    )
    return _Counted(plan, asked_at, positions)


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
    absent: list[UUID] = list(_run(connection, _ABSENT, {"event_ids": list(request.event_ids)}).scalars())
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


def _told(request: Request) -> dict[str, Any]:
    return {"event_ids": len(request.event_ids)} if request.event_ids else {}


def _is_busy(engine: Engine, handler: str) -> ReplayRefused:
    with engine.connect() as connection:
        other = _run(connection, _ACTIVE, {"handler": handler}).one_or_none()
    if other is None:
        return ReplayRefused(f"another replay of {handler} began at the same moment; try again")
    return ReplayRefused(f"{handler} has a replay already: {other.id} ({other.state}); wait for it, or cancel it")


# Looking and changing ------------------------------------------------------------------------------


def _replays(
    connection: Connection,
    *,
    id: UUID | None = None,
    handler: str | None = None,
    before: UUID | None = None,
    limit: int = 1,
) -> list[Replay]:
    fields = {"id": id, "handler": handler, "before": before, "limit": limit, "stalled": STALLED_SECONDS}
    return [_replay_of(row) for row in _run(connection, _LIST, fields).mappings()]


def _replay_of(row: RowMapping) -> Replay:
    return Replay(**row)


def _replay(connection: Connection, id: UUID) -> Replay:
    found = _replays(connection, id=id)
    if not found:
        raise ReplayRefused(f"there is no replay {id}; see `dovecote replay list`")
    return found[0]


def _change(
    engine: Engine,
    id: UUID,
    verb: str,
    from_states: Sequence[str],
    to: str,
    by: str,
    reason: str | None,
    dry_run: bool,
) -> Replay:
    require_who_and_why(by, reason)
    with engine.begin() as connection:
        before = _replay(connection, id)
        changed = before.state in from_states
        if changed and not dry_run:
            row = _run(connection, _CHANGE, {"id": id, "to": to, "from": list(from_states)}).one_or_none()
            changed = row is not None
        if not changed:
            raise ReplayRefused(f"replay {id} is {before.state}: there is nothing to {verb}")
        if dry_run:
            return before
        details = {"replay": str(id), "handler": before.handler, "done": before.done, "total": before.total}
        if to == "cancelled":
            details["retries_forgotten"] = _run(connection, _FORGET_RETRIES, {"id": id}).rowcount
        record(connection, actor=by, action=f"replay.{verb}", reason=reason, affected=before.done, details=details)
        _tell_relay(connection)
        return _replay(connection, id)


def _tell_relay(connection: Connection) -> None:
    _run(connection, "select pg_notify(%(channel)s, '')", {"channel": replays.CHANNEL})


def _run(connection: Connection, query: str, fields: Mapping[str, Any] | None = None) -> CursorResult[Any]:
    # The driver's own words: the relay asks with the same SQL on a connection without SQLAlchemy.
    return connection.exec_driver_sql(query, dict(fields or {}))
