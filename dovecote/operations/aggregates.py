"""Blocked aggregates: one line each, not one for every event that waits."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from dovecote.operations.page import Page, read_cursor
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import WrongRequest, require_handler
from dovecote.route import Route

_MAX_COUNTED = 10_000


@dataclass(frozen=True)
class Blocked:
    """One aggregate that is blocked for one handler.

    event_id  the event that holds it up; None once nothing does and the relay has not noticed yet
    state     dead, retrying, or under way when a consumer or the queue has it
    waiting   events behind it; a lower bound where `at_least` says so
    since     when the event failed first, or the first one behind began to wait
    """

    handler: str
    aggregate_type: str
    aggregate_id: str
    event_id: UUID | None
    event_type: str | None
    state: str
    error_type: str | None
    fingerprint: str | None
    error: str | None
    waiting: int
    at_least: bool
    since: datetime


# From one aggregate to the next by the index of waiting events, however many wait behind each.
_STUCK = """
    with recursive stuck (type, id, position, since, n) as (
        (select aggregate_type, aggregate_id, position, first_failed_at, 1 from dovecote.deliveries
         where state = 'waiting' and handler_name = :handler
           and (aggregate_type, aggregate_id) > (:after_type, :after_id)
         order by aggregate_type, aggregate_id, position limit 1)
        union all
        select f.*, s.n + 1 from stuck s cross join lateral (
            select aggregate_type, aggregate_id, position, first_failed_at from dovecote.deliveries
            where state = 'waiting' and handler_name = :handler and (aggregate_type, aggregate_id) > (s.type, s.id)
            order by aggregate_type, aggregate_id, position limit 1) f
        where s.n < :limit
    )
"""
_BLOCKED = text(
    f"""
    {_STUCK}
    select :handler as handler, s.type as aggregate_type, s.id as aggregate_id, b.event_id,
           coalesce(d.event_type, (select event_type from dovecote.outbox where id = b.event_id)) as event_type,
           case when b.event_id is null then 'free' else coalesce(d.state, 'under way') end as state,
           d.error_type, d.error_fingerprint as fingerprint,
           left(d.headline, 300) as error,
           few.count as waiting, few.count = :most as at_least, coalesce(d.first_failed_at, s.since) as since
    from stuck s
    cross join lateral (
        select dovecote.blocker(:handler, :event_types, s.type, s.id, s.position) as event_id) b
    left join dovecote.deliveries d on d.handler_name = :handler and d.event_id = b.event_id
    cross join lateral (
        select count(*) from (select from dovecote.deliveries w
            where w.state = 'waiting' and w.handler_name = :handler and w.aggregate_type = s.type
              and w.aggregate_id = s.id limit :most) f) few
    order by s.type, s.id
    """  # noqa: S608 - put together from constants
)
_COUNT_BLOCKED = text(f"{_STUCK} select count(*) from stuck")  # noqa: S608 - as above


def list_blocked_aggregates(
    engine: Engine,
    routes: Sequence[Route],
    *,
    handler: str | None = None,
    limit: int = 50,
    after: str | None = None,
) -> Page[Blocked]:
    """Return aggregates with events that wait. `after` is a page's `next`.

    Errors: BadCursor; WrongRequest for a handler that is not there, or that keeps no order.
    """
    require_handler(handler, routes)
    after_handler, *after_aggregate = read_cursor(after, str, str, str, first=["", "", ""])
    found: list[Blocked] = []
    ordered = sorted((route for route in routes if route.ordered), key=lambda route: route.handler)
    if handler is not None and handler not in {route.handler for route in ordered}:
        raise WrongRequest(f"{handler} keeps no order, so nothing of it waits: see `dovecote deliveries list`")
    with snapshot(engine) as connection:
        for route in ordered:
            if route.handler < after_handler or handler not in (None, route.handler) or len(found) > limit:
                continue
            after_type, after_id = after_aggregate if route.handler == after_handler else ("", "")
            rows = connection.execute(
                _BLOCKED,
                {
                    "handler": route.handler,
                    "event_types": route.event_types,
                    "after_type": after_type,
                    "after_id": after_id,
                    "limit": limit + 1 - len(found),
                    "most": _MAX_COUNTED,
                },
            )
            found += [Blocked(**row._mapping) for row in rows]
    return Page.of(found, limit, lambda one: [one.handler, one.aggregate_type, one.aggregate_id])


def count_blocked(connection: Connection, routes: Sequence[Route], most: int = 1_000) -> dict[str, int]:
    """Return how many aggregates are blocked, by handler; each count is bounded."""
    first = {"after_type": "", "after_id": "", "limit": most}
    return {
        route.handler: connection.execute(_COUNT_BLOCKED, {"handler": route.handler, **first}).scalar_one()
        for route in routes
        if route.ordered
    }
