"""Start, look at, pause, resume and cancel replays. The relay does the work (workers/relay/replaying.py)."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import Connection, Engine, RowMapping
from sqlalchemy.exc import IntegrityError

from workers import replays
from workers.operations.asking import require_handler, require_who_and_why
from workers.operations.audit import record
from workers.operations.reading import snapshot
from workers.operations.replay_plans import Plan, ReplayRefused, Request, counted, run
from workers.replays import Strength
from workers.routes import Route

__all__ = [
    "Plan",
    "Replay",
    "ReplayPage",
    "ReplayRefused",
    "Request",
    "cancel",
    "listed",
    "pause",
    "plan",
    "resume",
    "shown",
    "start",
]

#: An event that is not settled for so long means that nobody acts.
STALLED_SECONDS = 10.0


@dataclass(frozen=True)
class Replay:
    """How a replay stands.

    done     events settled: acted on, or in `deliveries`
    acted    events acted on
    events_per_second  since it began; None before the first wave
    stalled_seconds    how long no event has been settled although it runs; None while all is well
    handler_is_paused  it waits until its handler is resumed
    problem  why the relay leaves it alone, or has refused it; None where it does not
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
    problem: str | None = None

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
           case when isfinite(r.updated_at) and isfinite(r.created_at) then
               r.done / nullif(extract(epoch from r.updated_at - r.created_at), 0)::float8 end as events_per_second,
           case when r.state in ('pending', 'running') and isfinite(r.updated_at)
                     and r.updated_at < clock_timestamp() - make_interval(secs => %(stalled)s)
                then extract(epoch from clock_timestamp() - r.updated_at)::float8 end as stalled_seconds,
           exists (select from dovecote.paused_handlers h where h.handler_name = r.handler_name) as handler_is_paused,
           r.problem
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
        return counted(connection, routes, request).plan


def start(engine: Engine, routes: Sequence[Route], request: Request) -> Plan:
    """Have the relay do it; return what it will do and the replay's id.

    Errors: WrongRequest, ReplayRefused.
    """
    why = "a replay needs a reason: it is written into the audit log"
    require_who_and_why(request.requested_by, request.reason, why=why)
    try:
        with engine.begin() as connection:
            found = counted(connection, routes, request)
            asked = {**request.filter.as_json(), **_told(request)}
            started = run(
                connection,
                _START,
                {
                    "requested_by": request.requested_by,
                    "reason": request.reason,
                    "strength": request.strength,
                    "handler": request.handler,
                    "filter": json.dumps(request.filter.as_json()),
                    "total": found.plan.events,
                    "cursor": found.plan.first_position - 1,
                    "upto": found.plan.last_position,
                    "positions": found.positions,
                    "rate": request.rate,
                    "asked_at": found.asked_at,
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
                affected=found.plan.events,
                details=details,
            )
            _tell_relay(connection)
    except IntegrityError as error:
        if isinstance(error.orig, psycopg.errors.UniqueViolation):
            raise _is_busy(engine, request.handler) from None
        raise
    return Plan(**{**vars(found.plan), "replay_id": started.id})


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


def _told(request: Request) -> dict[str, Any]:
    return {"event_ids": len(request.event_ids)} if request.event_ids else {}


def _is_busy(engine: Engine, handler: str) -> ReplayRefused:
    with engine.connect() as connection:
        other = run(connection, _ACTIVE, {"handler": handler}).one_or_none()
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
    return [_replay_of(row) for row in run(connection, _LIST, fields).mappings()]


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
            row = run(connection, _CHANGE, {"id": id, "to": to, "from": list(from_states)}).one_or_none()
            changed = row is not None
        if not changed:
            raise ReplayRefused(f"replay {id} is {before.state}: there is nothing to {verb}")
        if dry_run:
            return before
        details = {"replay": str(id), "handler": before.handler, "done": before.done, "total": before.total}
        if to == "cancelled":
            details["retries_forgotten"] = run(connection, _FORGET_RETRIES, {"id": id}).rowcount
        record(connection, actor=by, action=f"replay.{verb}", reason=reason, affected=before.done, details=details)
        _tell_relay(connection)
        return _replay(connection, id)


def _tell_relay(connection: Connection) -> None:
    run(connection, "select dovecote.wake(%(channel)s)", {"channel": replays.CHANNEL})
