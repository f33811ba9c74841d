"""Start, look at, pause, resume and cancel replays. The relay does the work (dovecote/relay/replayer.py)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, RowMapping

from dovecote.operations.page import Page, read_cursor
from dovecote.operations.replay_plans import Plan, ReplayRefused, Request, planned, run
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import changing, require_handler, require_who_and_why
from dovecote.route import Route
from dovecote.store.replays import Mode, ReplaySelection

__all__ = [
    "Plan",
    "Replay",
    "ReplayRefused",
    "ReplaySelection",
    "Request",
    "cancel",
    "get_replay",
    "list_replays",
    "pause",
    "plan",
    "resume",
    "start",
]

#: Without a finished event for this long, a running replay counts as stalled.
STALLED_SECONDS = 10.0


@dataclass(frozen=True)
class Replay:
    """How a replay stands.

    done     events finished: acted on, or in `deliveries`
    acted    events acted on
    events_per_second  since it began; None before the first wave
    stalled_seconds    seconds without a finished event while it runs; None while events finish
    handler_is_paused  it waits until its handler is resumed
    problem  why the relay skips or has refused it; None otherwise
    """

    id: UUID
    handler: str
    mode: Mode
    filter: dict[str, Any]
    state: str
    total: int
    done: int
    retrying: int
    waiting: int
    dead: int
    discarded: int
    rate: int | None
    actor: str
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


_LIST = """
    select r.id, r.handler_name as handler, r.mode, r.filter, r.state, coalesce(r.total, 0) as total, r.done,
           r.rate, r.actor, r.reason, r.created_at, r.updated_at, r.finished_at, f.*,
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

_CHANGE = {
    verb: f"select dovecote.{verb}_replay(%(actor)s, %(reason)s, %(id)s)" for verb in ("pause", "resume", "cancel")
}


def plan(engine: Engine, routes: Sequence[Route], request: Request) -> Plan:
    """Return what the replay would do, and do nothing.

    Errors: WrongRequest, ReplayRefused.
    """
    with changing(engine, ReplayRefused) as connection:
        return planned(connection, routes, request, start=False)


def start(engine: Engine, routes: Sequence[Route], request: Request) -> Plan:
    """Have the relay do it; return what it will do and the replay's id.

    Errors: WrongRequest, ReplayRefused.
    """
    why = "a replay needs a reason: it is written into the audit log"
    require_who_and_why(request.actor, request.reason, why=why)
    with changing(engine, ReplayRefused) as connection:
        return planned(connection, routes, request, start=True)


def list_replays(
    engine: Engine,
    *,
    routes: Sequence[Route] = (),
    handler: str | None = None,
    before: str | None = None,
    limit: int = 50,
) -> Page[Replay]:
    """Return replays, the newest first; `before` is a page's `next`.

    Errors: WrongRequest for a handler that is neither in `routes` nor was ever replayed.
    """
    [before_id] = read_cursor(before, UUID, first=[None])
    with snapshot(engine) as connection:
        found = _replays(connection, handler=handler, before=before_id, limit=limit + 1)
    if not found:
        require_handler(handler, routes)
    return Page.of(found, limit, lambda replay: [replay.id])


def get_replay(engine: Engine, id: UUID) -> Replay:
    """Return one replay.

    Errors: ReplayRefused when there is none.
    """
    with engine.connect() as connection:
        return _replay(connection, id)


def pause(engine: Engine, id: UUID, *, actor: str, reason: str | None = None, dry_run: bool = False) -> Replay:
    """Have the relay send no more of it; what is on the queue is still acted on.

    Errors: ReplayRefused when it does not run.
    """
    return _change(engine, id, "pause", ("pending", "running"), actor, reason, dry_run)


def resume(engine: Engine, id: UUID, *, actor: str, reason: str | None = None, dry_run: bool = False) -> Replay:
    """Go on from where it was paused.

    Errors: ReplayRefused when it is not paused.
    """
    return _change(engine, id, "resume", ("paused",), actor, reason, dry_run)


def cancel(engine: Engine, id: UUID, *, actor: str, reason: str | None = None, dry_run: bool = False) -> Replay:
    """End it: nothing more is sent, and its retries are dropped. What was acted on stays.

    Errors: ReplayRefused when it is over.
    """
    return _change(engine, id, "cancel", ("pending", "running", "paused"), actor, reason, dry_run)


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
    actor: str,
    reason: str | None,
    dry_run: bool,
) -> Replay:
    require_who_and_why(actor, reason)
    with changing(engine, ReplayRefused) as connection:
        before = _replay(connection, id)
        if before.state not in from_states:
            raise ReplayRefused(f"replay {id} is {before.state}: there is nothing to {verb}")
        if dry_run:
            return before
        run(connection, _CHANGE[verb], {"actor": actor, "reason": reason, "id": id})
        return _replay(connection, id)
