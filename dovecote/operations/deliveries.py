"""Failed deliveries: by kind, one by one, and each in full; and what operators do about them: retry or discard.

The database changes them, batch by batch, each batch with its line in the audit log (migration 0029).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text

from dovecote.errors import DovecoteError
from dovecote.operations.page import Page, position, read_cursor
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import changing, require_handler, require_range, require_who_and_why
from dovecote.route import Route
from dovecote.store.delivery_state import DeliveryState
from dovecote.store.unsendable import EventIsGone

# Rows looked at for one count; more of them are "at least".
_MAX_COUNTED = 10_000
# Rows of one transaction, and the most that the functions take: it holds their locks for some 200 ms.
_BATCH = 5_000


class CannotChange(DovecoteError):
    """The delivery's state does not allow this; the message says what to do instead."""


_STATES_WITH_ERROR = (DeliveryState.RETRYING, DeliveryState.DEAD, DeliveryState.DISCARDED)


class NotThere(DovecoteError):
    """No such delivery: the event was processed, or the handler never received it."""


@dataclass(frozen=True)
class DeliverySelection:
    """A filter of deliveries. None matches everything; `since` compares the last change."""

    handler: str | None = None
    state: str | None = None
    fingerprint: str | None = None
    event_type: str | None = None
    aggregate_type: str | None = None
    aggregate_id: str | None = None
    since: datetime | None = None
    event_id: UUID | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the filter as the SQL functions take it: times as ISO 8601 with a zone, UTC by default."""
        asked = {name: value for name, value in asdict(self).items() if value is not None}
        if self.since is not None:
            asked["since"] = (self.since if self.since.tzinfo else self.since.replace(tzinfo=UTC)).isoformat()
        return {**asked, "event_id": str(self.event_id)} if self.event_id is not None else asked


@dataclass(frozen=True)
class Delivery:
    """One event that one handler has not processed. `error` is the headline: type and message."""

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
    """The largest first; `more` when there are more kinds than the limit."""

    groups: list[Group]
    more: bool


@dataclass(frozen=True)
class DeliveryDetail:
    """One delivery in full.

    waiting_behind  events of its aggregate that wait behind it; a lower bound from 10,000 on
    waits_for       the event it waits behind
    """

    delivery: Delivery
    traceback: str | None
    trace_id: str | None
    waiting_behind: int
    waits_for: UUID | None


@dataclass(frozen=True)
class Change:
    """What a retry or a discard did, or would do.

    affected  deliveries changed; in a dry run, the exact number that would be
    busy      deliveries left alone because a worker was trying them just then
    released  events that waited behind what was discarded and are on their way now
    sample    some of them
    """

    verb: str
    dry_run: bool
    affected: int
    busy: int
    released: int
    sample: list[Delivery]


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


_COUNT_CHANGEABLE = text(
    "select asked_at, states, matching from dovecote.count_changeable(:verb, cast(:filter as jsonb))"
)
# The same deliveries that the verb's function changes.
_CHANGEABLE = "dovecote.is_changeable(d, :verb, cast(:filter as jsonb), cast(:states as text[]))"
_SAMPLE = text(
    f"select {ROW} from dovecote.deliveries d where {_CHANGEABLE} order by d.position desc limit 5"  # noqa: S608 - put together from constants
)
_BUSY = text(
    f"select count(*) from dovecote.deliveries d where {_CHANGEABLE} and d.updated_at <= :began"  # noqa: S608 - put together from constants
)
_ASKED = "(:actor, :reason, cast(:filter as jsonb), :began, :batch)"
_CHANGE = {
    "retry": text(f"select affected, released from dovecote.retry_deliveries{_ASKED}"),  # noqa: S608 - put together from constants
    "discard": text(f"select affected, released from dovecote.discard_deliveries{_ASKED}"),  # noqa: S608 - put together from constants
}


def list_deliveries(
    engine: Engine,
    wanted: DeliverySelection,
    *,
    routes: Sequence[Route] = (),
    limit: int = 50,
    before: str | None = None,
) -> Page[Delivery]:
    """Return deliveries, newest event first. `before` is a page's `next`.

    Errors: BadCursor; WrongRequest for a handler that is neither in `routes` nor has deliveries.
    """
    before_position, before_handler = read_cursor(before, position, str, first=[2**63 - 1, ""])
    require_range(wanted.since, None)
    with snapshot(engine) as connection:
        rows = connection.execute(
            _LIST,
            {
                # What waits has no error: it need not be searched for one.
                **parameters_of(wanted, _STATES_WITH_ERROR if wanted.fingerprint else list(DeliveryState)),
                "before_position": before_position,
                "before_handler": before_handler,
                "limit": limit + 1,
            },
        ).all()
    if not rows:
        require_handler(wanted.handler, routes)
    return Page.of([Delivery(**row._mapping) for row in rows], limit, lambda one: [one.position, one.handler])


def list_delivery_groups(
    engine: Engine, wanted: DeliverySelection, *, routes: Sequence[Route] = (), limit: int = 50
) -> Groups:
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


def get_delivery(engine: Engine, routes: Sequence[Route], handler: str, event_id: UUID) -> DeliveryDetail:
    """Return one delivery in full. Errors: NotThere."""
    with snapshot(engine) as connection:
        row = connection.execute(_SHOW, {"handler": handler, "event_id": event_id, "most": _MAX_COUNTED}).one_or_none()
        if row is None:
            raise NotThere(
                f"no failed delivery of {event_id} for {handler}; `dovecote events show {event_id}` shows how it went"
            )
        fields = dict(row._mapping)
        traceback, trace_id, behind = (fields.pop(name) for name in ("traceback", "trace_id", "waiting_behind"))
        found = Delivery(**fields)
        waits_for = None
        if found.state == DeliveryState.WAITING:
            route = next((route for route in routes if route.handler == handler), None)
            waits_for = connection.execute(
                _BLOCKER, {**asdict(found), "event_types": route.event_types if route else [found.event_type]}
            ).scalar_one()
    return DeliveryDetail(found, traceback, trace_id, behind, waits_for)


def retry(
    engine: Engine,
    wanted: DeliverySelection,
    *,
    actor: str,
    reason: str | None = None,
    dry_run: bool = False,
    routes: Sequence[Route] = (),
) -> Change:
    """Send dead deliveries again at once, with all of their route's attempts before them.

    With a state of `retrying` in the filter: those that wait for their next attempt, at once. Those that are dead
    because their event is gone stay as they are, unless it is back.
    Errors: WrongRequest; NotThere and CannotChange for a single one.
    """
    require_who_and_why(actor, reason)
    return _change(engine, wanted, "retry", actor, reason, dry_run, routes)


def discard(
    engine: Engine,
    wanted: DeliverySelection,
    *,
    actor: str,
    reason: str,
    dry_run: bool = False,
    routes: Sequence[Route] = (),
) -> Change:
    """Give deliveries up for good; what waited behind them goes on in order.

    Dead ones, or with that state in the filter, retrying ones that have been tried at least once. Of a handler that no
    route has: with their state in the filter, all retrying and waiting ones.
    Errors: WrongRequest; NotThere and CannotChange for a single one.
    """
    require_who_and_why(actor, reason, why="a discard needs a reason: what is given up is not done by anybody later")
    return _change(engine, wanted, "discard", actor, reason, dry_run, routes)


def _change(
    engine: Engine,
    wanted: DeliverySelection,
    verb: str,
    actor: str,
    reason: str | None,
    dry_run: bool,
    routes: Sequence[Route],
) -> Change:
    require_range(wanted.since, None)
    asked = wanted.as_json()
    if verb == "discard" and routes and wanted.handler not in {None, *(route.handler for route in routes)}:
        # Nobody acts on what comes after, so all of it can be given up.
        asked["without_route"] = True
    parameters: dict[str, Any] = {"verb": verb, "filter": json.dumps(asked)}
    with changing(engine, CannotChange) as connection:
        began, states, matching = connection.execute(_COUNT_CHANGEABLE, parameters).one()
        parameters["states"] = states
        sample = [Delivery(**row._mapping) for row in connection.execute(_SAMPLE, parameters)]
    if wanted.event_id is not None and not matching:
        _explain(engine, wanted, verb)
    if not matching:
        require_handler(wanted.handler, routes)
    if dry_run:
        return Change(verb, True, matching, 0, 0, sample)
    parameters |= {"actor": actor, "reason": reason, "began": began, "batch": _BATCH}
    affected = released = 0
    while True:
        with changing(engine, CannotChange) as connection:
            done = connection.execute(_CHANGE[verb], parameters).one()
        affected += done.affected
        released += done.released
        if done.affected < _BATCH:
            break
    with engine.connect() as connection:
        busy = connection.execute(_BUSY, parameters).scalar_one()
    if wanted.event_id is not None and not affected:
        _explain(engine, wanted, verb)
    return Change(verb, False, affected, busy, released, sample)


def _explain(engine: Engine, wanted: DeliverySelection, verb: str) -> None:
    """Explain why a single delivery was not changed. Errors: NotThere, CannotChange."""
    assert wanted.handler is not None, "a single delivery is named by handler and event"
    assert wanted.event_id is not None
    found = get_delivery(engine, (), wanted.handler, wanted.event_id)
    advice = {
        "waiting": f"it waits behind an earlier event of {found.delivery.aggregate_type} "
        f"{found.delivery.aggregate_id}: {verb} that one (`dovecote aggregates blocked`)",
        "discarded": "it was given up; a replay sends it again",
        "retrying": "it has not been tried yet; wait for its first attempt",
        "dead": "somebody else has just changed it; look again",
    }[found.delivery.state]
    if verb == "retry" and found.delivery.error_type == EventIsGone.__qualname__:
        advice = (
            "the event is not in the outbox any more, so nobody can act on it: discard it, or put the row back there "
            "with this id and retry"
        )
    raise CannotChange(f"{wanted.handler} {wanted.event_id} is {found.delivery.state}: {advice}")


def parameters_of(wanted: DeliverySelection, states: Sequence[str]) -> dict[str, Any]:
    """Return what MATCHES takes, and the filter's state or else these states."""
    given = asdict(wanted)
    state = given.pop("state")
    return {**given, "states": [state] if state else list(states)}
