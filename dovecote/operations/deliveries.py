"""What did not go well: by kind, one by one, and each with its whole story. Nothing is changed here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text

from dovecote.errors import DovecoteError
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import BadCursor, require_handler, require_range
from dovecote.route import Route
from dovecote.store.delivery_state import DeliveryState

# Rows looked at for one count; more of them are "at least".
_MAX_COUNTED = 10_000
_STATES_WITH_ERROR = (DeliveryState.RETRYING, DeliveryState.DEAD, DeliveryState.DISCARDED)


class NotThere(DovecoteError):
    """There is no such delivery: the event went well, or never came to this handler."""


@dataclass(frozen=True)
class Filter:
    """Which deliveries. What is None is not asked; `since` is about the last change."""

    handler: str | None = None
    state: str | None = None
    fingerprint: str | None = None
    event_type: str | None = None
    aggregate_type: str | None = None
    aggregate_id: str | None = None
    since: datetime | None = None
    event_id: UUID | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what is asked, as the verbs take it: moments as ISO 8601 with their zone, UTC where there is none."""
        asked = {name: value for name, value in asdict(self).items() if value is not None}
        if self.since is not None:
            asked["since"] = (self.since if self.since.tzinfo else self.since.replace(tzinfo=UTC)).isoformat()
        return {**asked, "event_id": str(self.event_id)} if self.event_id is not None else asked


@dataclass(frozen=True)
class Failure:
    """One event that one handler has not done. `error` is the headline: type and message."""

    handler: str
    event_id: UUID
    position: int
    event_type: str
    aggregate_type: str
    aggregate_id: str
    state: str
    attempts: int
    next_attempt_at: datetime | None
    error_type: str | None
    fingerprint: str | None
    error: str | None
    first_failed_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class FailurePage:
    """Newest events first; `before` is what to go on from, None at the end."""

    deliveries: list[Failure]
    before: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Failures of one kind at one handler. `count` is a lower bound where `at_least` says so.

    fingerprint  None for what has no error: it waits, or was never tried
    """

    handler: str
    state: str
    fingerprint: str | None
    count: int
    at_least: bool
    error_type: str | None
    error: str | None
    first_at: datetime
    last_at: datetime
    example: UUID


@dataclass(frozen=True)
class Groups:
    """The largest first; `more` when there are more kinds than were asked for."""

    groups: list[Group]
    more: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Story:
    """One delivery with all that is known of it.

    waiting_behind  events of its aggregate that wait behind it; a lower bound from 10,000 on
    waits_for       the event it waits behind
    """

    delivery: Failure
    traceback: str | None
    trace_id: str | None
    waiting_behind: int
    waits_for: UUID | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


ROW = """
    d.handler_name as handler, d.event_id, d.position, d.event_type, d.aggregate_type, d.aggregate_id, d.state,
    d.attempts, d.next_attempt_at, d.error_type, d.error_fingerprint as fingerprint,
    left(d.headline, 300) as error, d.first_failed_at, d.updated_at
"""
MATCHES = """
        (cast(:fingerprint as text) is null or d.error_fingerprint = :fingerprint)
    and (cast(:event_type as text) is null or d.event_type = :event_type)
    and (cast(:aggregate_type as text) is null or d.aggregate_type = :aggregate_type)
    and (cast(:aggregate_id as text) is null or d.aggregate_id = :aggregate_id)
    and (cast(:event_id as uuid) is null or d.event_id = :event_id)
    and (cast(:since as timestamptz) is null or d.updated_at >= :since)
"""
# Every handler with deliveries, or the one that is asked for, from the index alone.
HANDLERS = """
    with recursive h (name) as (
        (select handler_name from dovecote.deliveries order by handler_name limit 1)
        union all
        select (select d.handler_name from dovecote.deliveries d where d.handler_name > h.name
                order by d.handler_name limit 1) from h where h.name is not null
    )
    select name from h where name is not null and (cast(:handler as text) is null or name = :handler)
"""
_STATES = "unnest(cast(:states as text[]))"

# One walk for each handler and state, by the index that ends with the position.
_LIST = text(
    f"""
    select d.* from ({HANDLERS}) h cross join {_STATES} as s (name)
    cross join lateral (
        select {ROW} from dovecote.deliveries d
        where d.handler_name = h.name and d.state = s.name
          and (d.position, d.handler_name) < (:before_position, :before_handler) and {MATCHES}
        order by d.position desc limit :limit) d
    order by d.position desc, d.handler desc limit :limit
    """  # noqa: S608 - put together from constants
)

# How many there are of one kind, the first and the last.
_OF_KIND = """
    select k.handler, k.state, last.error_fingerprint as fingerprint, few.count, few.count = :most as at_least,
           last.error_type, left(last.headline, 300) as error,
           first.updated_at as first_at, last.updated_at as last_at, last.event_id as example
    from {kinds} k
    cross join lateral (
        select count(*) from (select from dovecote.deliveries
            where state = k.state and handler_name = k.handler and {same} limit :most) f) few
    cross join lateral (
        select updated_at from dovecote.deliveries
        where state = k.state and handler_name = k.handler and {same} order by updated_at limit 1) first
    cross join lateral (
        select * from dovecote.deliveries
        where state = k.state and handler_name = k.handler and {same} order by updated_at desc limit 1) last
    where cast(:fingerprint as text) is null or last.error_fingerprint = :fingerprint
"""

# From one fingerprint to the next, without a look at the rows between; those without one come last.
_GROUPS = text(
    f"""
    with recursive wanted as (
        select h.name as handler, s.name as state from ({HANDLERS}) h cross join {_STATES} as s (name)
    ), kinds (handler, state, fingerprint) as (
        select w.handler, w.state, f.* from wanted w cross join lateral (
            select error_fingerprint from dovecote.deliveries
            where state = w.state and handler_name = w.handler and error_fingerprint is not null
            order by error_fingerprint limit 1) f
        union all
        select k.handler, k.state, f.* from kinds k cross join lateral (
            select error_fingerprint from dovecote.deliveries
            where state = k.state and handler_name = k.handler and error_fingerprint > k.fingerprint
            order by error_fingerprint limit 1) f
    )
    {_OF_KIND.format(kinds="kinds", same="error_fingerprint = k.fingerprint")}
    union all
    {_OF_KIND.format(kinds="wanted", same="error_fingerprint is null")}
    order by count desc, handler, fingerprint limit :limit
    """  # noqa: S608 - put together from constants
)

_SHOW = text(
    f"""
    select {ROW}, d.error as traceback, d.trace_id,
           (select count(*) from (select from dovecote.deliveries w
            where w.state = 'waiting' and w.handler_name = d.handler_name and w.aggregate_type = d.aggregate_type
              and w.aggregate_id = d.aggregate_id and w.position > d.position limit :most) few) as waiting_behind
    from dovecote.deliveries d where d.handler_name = :handler and d.event_id = :event_id
    """  # noqa: S608 - put together from constants
)
_BLOCKER = text("select dovecote.blocker(:handler, :event_types, :aggregate_type, :aggregate_id, :position)")


def failures(
    engine: Engine,
    wanted: Filter,
    *,
    routes: Sequence[Route] = (),
    limit: int = 50,
    before: str | None = None,
) -> FailurePage:
    """Return deliveries, newest event first. `before` is a page's `before`: <position>:<handler>.

    Errors: BadCursor; WrongRequest for a handler that is neither in `routes` nor has deliveries.
    """
    position, _, handler = (before or "").partition(":")
    if before and not _is_position(position):
        raise BadCursor(f"--before takes what the page before gave, such as 4711:billing.write_history; got {before}")
    require_range(wanted.since, None)
    with snapshot(engine) as connection:
        rows = connection.execute(
            _LIST,
            {
                # What waits has no error: it need not be searched for one.
                **parameters_of(wanted, _STATES_WITH_ERROR if wanted.fingerprint else list(DeliveryState)),
                "before_position": int(position) if before else 2**63 - 1,
                "before_handler": handler,
                "limit": limit + 1,
            },
        ).all()
    if not rows:
        require_handler(wanted.handler, routes)
    found = [Failure(**row._mapping) for row in rows]
    last = found[limit - 1] if len(found) > limit else None
    return FailurePage(found[:limit], f"{last.position}:{last.handler}" if last else None)


def failure_groups(engine: Engine, wanted: Filter, *, routes: Sequence[Route] = (), limit: int = 50) -> Groups:
    """Return failures by handler and kind, the largest first; of the dead, unless another state is asked for.

    Only handler, state and fingerprint of the filter are looked at.
    Errors: WrongRequest for a handler that is neither in `routes` nor has deliveries.
    """
    with snapshot(engine) as connection:
        parameters = {**parameters_of(wanted, (DeliveryState.DEAD,)), "most": _MAX_COUNTED, "limit": limit + 1}
        rows = connection.execute(_GROUPS, parameters).all()
    if not rows:
        require_handler(wanted.handler, routes)
    return Groups([Group(**row._mapping) for row in rows[:limit]], more=len(rows) > limit)


def failure(engine: Engine, routes: Sequence[Route], handler: str, event_id: UUID) -> Story:
    """Return all that is known of one delivery. Errors: NotThere."""
    with snapshot(engine) as connection:
        row = connection.execute(_SHOW, {"handler": handler, "event_id": event_id, "most": _MAX_COUNTED}).one_or_none()
        if row is None:
            raise NotThere(
                f"{handler} has no trouble with {event_id}; `dovecote events show {event_id}` tells how it went"
            )
        facts = dict(row._mapping)
        traceback, trace_id, behind = (facts.pop(name) for name in ("traceback", "trace_id", "waiting_behind"))
        found = Failure(**facts)
        waits_for = None
        if found.state == DeliveryState.WAITING:
            route = next((route for route in routes if route.handler == handler), None)
            waits_for = connection.execute(
                _BLOCKER, {**asdict(found), "event_types": route.event_types if route else [found.event_type]}
            ).scalar_one()
    return Story(found, traceback, trace_id, behind, waits_for)


def parameters_of(wanted: Filter, states: Sequence[str]) -> dict[str, Any]:
    """Return what MATCHES takes, and the filter's state or else these states."""
    facts = asdict(wanted)
    state = facts.pop("state")
    return {**facts, "states": [state] if state else list(states)}


def _is_position(given: str) -> bool:
    return given.isascii() and given.isdigit() and int(given) < 2**63
