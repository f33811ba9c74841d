"""Pause a handler and let it go on. Its events are kept: held as they come, resumed in order."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, text

from dovecote.errors import DovecoteError
from dovecote.operations.validation import changing, require_handler, require_who_and_why
from dovecote.route import Route


class CannotPause(DovecoteError):
    """The handler is paused already, or is not paused."""


@dataclass(frozen=True)
class Pause:
    """Who paused a handler, why, since when."""

    by: str
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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_PAUSED = text("select handler_name, actor, reason, paused_at from dovecote.paused_handlers")
_CHANGE = {verb: text(f"select dovecote.{verb}_handler(:actor, :reason, :handler)") for verb in ("pause", "resume")}


def paused(connection: Connection) -> dict[str, Pause]:
    """Return the handlers that are paused, by name; also one that no route has any more."""
    return {row.handler_name: Pause(row.actor, row.reason, row.paused_at) for row in connection.execute(_PAUSED)}


def handlers(engine: Engine, routes: Sequence[Route]) -> list[Handler]:
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
    before = next(one for one in handlers(engine, routes) if one.name == name)
    if (before.paused is not None) == (verb == "pause"):
        raise CannotPause(_nothing_to_do(before))
    if dry_run:
        return before
    with changing(engine, CannotPause) as connection:
        connection.execute(_CHANGE[verb], {"handler": name, "actor": actor, "reason": reason})
    return next(one for one in handlers(engine, routes) if one.name == name)


def _nothing_to_do(handler: Handler) -> str:
    if handler.paused is None:
        return f"{handler.name} is not paused"
    return (
        f"{handler.name} is paused already, by {handler.paused.by} since {handler.paused.since:%F %T %Z}: "
        f"{handler.paused.reason}"
    )
