"""What operators do about failures: send again at once, or give up. Each in its own transaction with its audit line.

Waiting events are never touched: each follows the one it waits for.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import Connection, Engine, text

from domain.errors import DovecoteError
from workers.operations.asking import require_handler, require_range, require_who_and_why
from workers.operations.audit import record
from workers.operations.failures import MATCHES, ROW, Failure, Filter, failure, parameters_of
from workers.relay.gone_events import EventIsGone
from workers.routes import Route

# Rows of one transaction: it holds their locks for some 200 ms.
_BATCH = 5_000
_SAMPLE = 5


class CannotChange(DovecoteError):
    """The delivery is in no state for this; the message says what to do instead."""


@dataclass(frozen=True)
class Change:
    """What a retry or a discard did, or would do.

    affected  deliveries changed; in a dry run, the exact number that would be
    busy      deliveries left alone because a worker was trying them at that moment
    released  events that waited behind what was discarded and are on their way now
    sample    some of them
    """

    verb: str
    dry_run: bool
    affected: int
    busy: int
    released: int
    sample: list[Failure]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# An event that was never tried may have an unfinished one before it. Discarding it would let those behind it pass
# that one: what comes after asks only for the one before (docs/adr/0009-one-predecessor.md).
_DISCARDABLE = "(d.state = 'dead' or (d.state = 'retrying' and d.error is not null))"
# Of a handler that no route has all can be given up: nobody acts on what comes after.
_ALL = "true"
# Nobody can act on an event that the outbox does not have; that one is gone, the relay has found out.
_RETRYABLE = (
    f"(d.error_type is distinct from '{EventIsGone.__qualname__}'"
    " or exists (select from dovecote.outbox o where o.id = d.event_id))"
)

_COUNT = f"""
    select count(*) from dovecote.deliveries d
    where d.state = any(:states) and (cast(:handler as text) is null or d.handler_name = :handler) and {MATCHES}
"""  # noqa: S608 - put together from constants
_CHOSEN = f"""
    select d.handler_name, d.event_id from dovecote.deliveries d
    where d.state = any(:states) and (cast(:handler as text) is null or d.handler_name = :handler) and {MATCHES}
      and d.updated_at <= :began
"""  # noqa: S608 - put together from constants
_TAKE = " order by d.handler_name, d.event_id limit :batch for update skip locked"

_RETRY = """
    update dovecote.deliveries d
    set state = 'retrying', attempts = 0, next_attempt_at = clock_timestamp(), updated_at = clock_timestamp()
    from chosen c where d.handler_name = c.handler_name and d.event_id = c.event_id
    returning d.handler_name
"""
_DISCARD = """
    update dovecote.deliveries d
    set state = 'discarded', next_attempt_at = null, updated_at = clock_timestamp()
    from chosen c where d.handler_name = c.handler_name and d.event_id = c.event_id
    returning d.handler_name, d.aggregate_type, d.aggregate_id, d.position, d.replay_id
"""
# An event that is being parked behind one of these is looked at again by who parks it, after this has committed.
_LOCK = text(
    "select pg_advisory_xact_lock_shared(dovecote.release_key(handler))"
    " from unnest(cast(:handlers as text[])) as handler"
)
# The first behind each; the others go with it or after it. What was discarded had been tried: all before it is done.
_RELEASE = text(
    """
    with done as (
        select handler, type, id, replay, min(position) as position
        from unnest(cast(:handlers as text[]), cast(:aggregate_types as text[]), cast(:aggregate_ids as text[]),
                    cast(:replays as uuid[]), cast(:positions as bigint[]))
             as done (handler, type, id, replay, position)
        group by handler, type, id, replay
    ), behind as (
        select d.handler_name, d.event_id, d.position, first_value(d.event_id) over (
            partition by d.handler_name, d.aggregate_type, d.aggregate_id, d.replay_id order by d.position) as first
        from done join dovecote.deliveries d
          on d.state = 'waiting' and d.handler_name = done.handler and d.aggregate_type = done.type
             and d.aggregate_id = done.id and d.position > done.position
             and d.replay_id is not distinct from done.replay
    ), released as (
        update dovecote.deliveries d
        set state = 'retrying', next_attempt_at = clock_timestamp(), leased_until = null,
            updated_at = clock_timestamp()
        from behind where behind.event_id = behind.first
          and d.handler_name = behind.handler_name and d.event_id = behind.event_id and d.state = 'waiting'
    )
    select count(*) from behind
    """
)
_NOTIFY = text("select dovecote.wake('dovecote_deliveries')")


def retry(
    engine: Engine,
    wanted: Filter,
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
    states = _states_for(wanted, "retry", ("dead",), ("dead", "retrying"))
    return _change(engine, wanted, "retry", _RETRY, states, _RETRYABLE, actor, reason, dry_run, routes)


def discard(
    engine: Engine, wanted: Filter, *, actor: str, reason: str, dry_run: bool = False, routes: Sequence[Route] = ()
) -> Change:
    """Give deliveries up for good; what waited behind them goes on in order.

    Dead ones, or with that state in the filter, retrying ones that have been tried at least once. Of a handler that no
    route has: with their state in the filter, all retrying and waiting ones.
    Errors: WrongRequest; NotThere and CannotChange for a single one.
    """
    require_who_and_why(actor, reason, why="a discard needs a reason: what is given up is not done by anybody later")
    if routes and wanted.handler is not None and wanted.handler not in {route.handler for route in routes}:
        states = _states_for(wanted, "discard", ("dead",), ("dead", "retrying", "waiting"))
        return _change(engine, wanted, "discard", _DISCARD, states, _ALL, actor, reason, dry_run, routes)
    states = _states_for(wanted, "discard", ("dead",), ("dead", "retrying"))
    return _change(engine, wanted, "discard", _DISCARD, states, _DISCARDABLE, actor, reason, dry_run, routes)


def _states_for(wanted: Filter, verb: str, usual: Sequence[str], possible: Sequence[str]) -> Sequence[str]:
    if wanted.event_id is not None:
        return possible
    if wanted.state is None:
        return usual
    if wanted.state not in possible:
        raise CannotChange(f"there is no {verb} of {wanted.state} deliveries, only of {' or '.join(possible)} ones")
    return (wanted.state,)


def _change(
    engine: Engine,
    wanted: Filter,
    verb: str,
    update: str,
    states: Sequence[str],
    condition: str,
    actor: str,
    reason: str | None,
    dry_run: bool,
    routes: Sequence[Route],
) -> Change:
    require_range(wanted.since, None)
    wanted = replace(wanted, state=None)
    parameters: dict[str, Any] = {**parameters_of(wanted, states), "states": list(states)}
    with engine.connect() as connection:
        began, matching = connection.execute(
            text(f"select clock_timestamp(), ({_COUNT} and {condition})"), parameters
        ).one()
        sample = _sample(connection, parameters, condition)
    if wanted.event_id is not None and not matching:
        _explain(engine, wanted, verb)
    if not matching:
        require_handler(wanted.handler, routes)
    if dry_run:
        return Change(verb, True, matching, 0, 0, sample)
    details = {"filter": wanted.as_json(), "states": list(states)}
    affected = released = 0
    # One that is tried at this moment is locked by its worker. A group leaves it alone; a single one is waited for.
    take = _TAKE if wanted.event_id is None else _TAKE.replace(" skip locked", "")
    statement = text(f"with chosen as ({_CHOSEN} and {condition} {take}) {update}")
    while True:
        with engine.begin() as connection:
            rows = connection.execute(statement, {**parameters, "began": began, "batch": _BATCH}).all()
            if rows and verb == "discard":
                released += _release(connection, rows)
            if rows:
                connection.execute(_NOTIFY)
                details["handlers"] = sorted({row.handler_name for row in rows})
                record(
                    connection,
                    actor=actor,
                    action=f"deliveries.{verb}",
                    reason=reason,
                    affected=len(rows),
                    details=details,
                )
        affected += len(rows)
        if len(rows) < _BATCH:
            break
    with engine.connect() as connection:
        busy = connection.execute(
            text(f"select count(*) from ({_CHOSEN} and {condition}) c"),  # noqa: S608 - put together from constants
            {**parameters, "began": began},
        ).scalar_one()
    if wanted.event_id is not None and not affected:
        _explain(engine, wanted, verb)
    return Change(verb, False, affected, busy, released, sample)


def _sample(connection: Connection, parameters: dict[str, Any], condition: str) -> list[Failure]:
    query = text(
        f"select {ROW} from dovecote.deliveries d where d.state = any(:states)"  # noqa: S608 - put together from constants
        f" and (cast(:handler as text) is null or d.handler_name = :handler) and {MATCHES} and {condition}"
        " order by d.position desc limit :sample"
    )
    rows = connection.execute(query, {**parameters, "sample": _SAMPLE})
    return [Failure(**row._mapping) for row in rows]


def _release(connection: Connection, rows: Sequence[Any]) -> int:
    """Send on the first event behind each of these; return how many waited behind them."""
    connection.execute(_LOCK, {"handlers": sorted({row.handler_name for row in rows})})
    parameters = {
        "handlers": [row.handler_name for row in rows],
        "aggregate_types": [row.aggregate_type for row in rows],
        "aggregate_ids": [row.aggregate_id for row in rows],
        "replays": [row.replay_id for row in rows],
        "positions": [row.position for row in rows],
    }
    return int(connection.execute(_RELEASE, parameters).scalar_one())


def _explain(engine: Engine, wanted: Filter, verb: str) -> None:
    """Say why a single one was left as it is. Errors: NotThere, CannotChange."""
    assert wanted.handler is not None, "a single delivery is named by handler and event"
    assert wanted.event_id is not None
    story = failure(engine, (), wanted.handler, wanted.event_id)
    advice = {
        "waiting": f"it waits behind an earlier event of {story.delivery.aggregate_type} "
        f"{story.delivery.aggregate_id}: {verb} that one (`dovecote aggregates blocked`)",
        "discarded": "it was given up; a replay sends it again",
        "retrying": "it has not been tried yet; wait for its first attempt",
        "dead": "somebody else changed it at this moment; look again",
    }[story.delivery.state]
    if verb == "retry" and story.delivery.error_type == EventIsGone.__qualname__:
        advice = (
            "the event is not in the outbox any more, so nobody can act on it: discard it, or put the row back there "
            "with this id and retry"
        )
    raise CannotChange(f"{wanted.handler} {wanted.event_id} is {story.delivery.state}: {advice}")
