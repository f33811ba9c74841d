"""Handlers: list, pause and resume them; list what Postgres still keeps for handlers without a route.

A paused handler's events are kept: held as they come, and resumed in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, text

from dovecote.errors import DovecoteError
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import changing, require_handler, require_who_and_why
from dovecote.route import Route
from dovecote.store.delivery_state import DeliveryState

# Rows counted of each state: what has more says so.
_MAX_COUNTED = 10_000

#: Takes `routed`, the handlers that have a route, and `most`. The names come from the indexes alone.
WITHOUT_ROUTE = """
    with recursive failed (name) as (
        (select handler_name from dovecote.deliveries order by handler_name limit 1)
        union all
        select (select d.handler_name from dovecote.deliveries d where d.handler_name > failed.name
                order by d.handler_name limit 1) from failed where failed.name is not null
    ), known as (
        select name from failed where name is not null
        union select handler_name from dovecote.subscriptions
        union select handler_name from dovecote.paused_handlers
        union select handler_name from dovecote.postponed
    )
    select known.name,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'retrying' limit %(most)s) few) as retrying,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'waiting' limit %(most)s) few) as waiting,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'dead' limit %(most)s) few) as dead,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'discarded' limit %(most)s) few) as discarded,
           array(select s.event_type from dovecote.subscriptions s where s.handler_name = known.name order by 1)
               as event_types,
           exists (select from dovecote.paused_handlers p where p.handler_name = known.name) as is_paused,
           exists (select from dovecote.postponed p where p.handler_name = known.name) as is_postponed
    from known where known.name <> all(%(routed)s::text[]) order by known.name
"""


class CannotPause(DovecoteError):
    """The handler is paused already, or is not paused."""


@dataclass(frozen=True)
class Pause:
    """Who paused a handler, why, since when."""

    actor: str
    reason: str
    since: datetime


@dataclass(frozen=True)
class Handler:
    """A handler and its route."""

    name: str
    queue: str
    event_types: list[str]
    ordered: bool
    bulk: bool
    replayable: bool
    attempts: int
    time_limit_seconds: float
    paused: Pause | None


@dataclass(frozen=True)
class HandlerWithoutRoute:
    """What Postgres keeps for a handler that no route has.

    event_types  its subscriptions: what of these it has not processed keeps weeks from being dropped
    at_least     which counts of deliveries may be larger
    """

    name: str
    retrying: int
    waiting: int
    dead: int
    discarded: int
    event_types: list[str]
    is_paused: bool
    is_postponed: bool
    at_least: list[str]


_PAUSED = text("select handler_name, actor, reason, paused_at from dovecote.paused_handlers")
_CHANGE = {verb: text(f"select dovecote.{verb}_handler(:actor, :reason, :handler)") for verb in ("pause", "resume")}


def paused(connection: Connection) -> dict[str, Pause]:
    """Return the handlers that are paused, by name; also one that no route has any more."""
    return {row.handler_name: Pause(row.actor, row.reason, row.paused_at) for row in connection.execute(_PAUSED)}


def list_handlers(engine: Engine, routes: Sequence[Route]) -> list[Handler]:
    """Return every handler, in the order of the routes."""
    with engine.connect() as connection:
        pauses_of = paused(connection)
    return [
        Handler(
            name=route.handler,
            queue=route.queue,
            event_types=route.event_types,
            ordered=route.ordered,
            bulk=route.bulk,
            replayable=route.replayable,
            attempts=route.max_attempts,
            time_limit_seconds=route.time_limit_seconds,
            paused=pauses_of.get(route.handler),
        )
        for route in routes
    ]


def parameters_without_route(routes: Sequence[Route], most: int = _MAX_COUNTED) -> dict[str, Any]:
    """Return what WITHOUT_ROUTE takes."""
    return {"routed": [route.handler for route in routes], "most": most}


def list_handlers_without_route(engine: Engine, routes: Sequence[Route]) -> list[HandlerWithoutRoute]:
    """Return the handlers that Postgres knows and no route has, by name."""
    with snapshot(engine) as connection:
        rows = connection.exec_driver_sql(WITHOUT_ROUTE, parameters_without_route(routes)).all()
    return [
        HandlerWithoutRoute(
            **row._mapping,
            at_least=[state for state in DeliveryState if row._mapping[state] == _MAX_COUNTED],
        )
        for row in rows
    ]


def pause(
    engine: Engine, routes: Sequence[Route], handler: str, *, actor: str, reason: str, dry_run: bool = False
) -> Handler:
    """Let a handler act on nothing more; what it is acting on now, it finishes.

    Its events wait in order, its retries keep their schedule and are due when it is resumed; replays of it stand still.
    Errors: WrongRequest; CannotPause when it is paused already.
    """
    require_who_and_why(actor, reason, why="a pause needs a reason: others have to know why the handler stands still")
    return _change(engine, routes, handler, "pause", actor, reason, dry_run)


def resume(
    engine: Engine,
    routes: Sequence[Route],
    handler: str,
    *,
    actor: str,
    reason: str | None = None,
    dry_run: bool = False,
) -> Handler:
    """Let a paused handler go on, with what it has missed first.

    Errors: WrongRequest; CannotPause when it is not paused.
    """
    require_who_and_why(actor, reason)
    return _change(engine, routes, handler, "resume", actor, reason, dry_run)


def _change(
    engine: Engine,
    routes: Sequence[Route],
    name: str,
    verb: str,
    actor: str,
    reason: str | None,
    dry_run: bool,
) -> Handler:
    require_handler(name, routes)
    before = next(one for one in list_handlers(engine, routes) if one.name == name)
    if (before.paused is not None) == (verb == "pause"):
        raise CannotPause(_nothing_to_do(before))
    if dry_run:
        return before
    with changing(engine, CannotPause) as connection:
        connection.execute(_CHANGE[verb], {"handler": name, "actor": actor, "reason": reason})
    return next(one for one in list_handlers(engine, routes) if one.name == name)


def _nothing_to_do(handler: Handler) -> str:
    if handler.paused is None:
        return f"{handler.name} is not paused"
    return (
        f"{handler.name} is paused already, by {handler.paused.actor} since {handler.paused.since:%F %T %Z}: "
        f"{handler.paused.reason}"
    )
