"""`dovecote handlers`: list, pause and resume them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from dovecote import operations
from dovecote.cli.options import Actor, DryRun, Reason, complete_handler
from dovecote.cli.output import AsJson, jsonable, print_json, print_listing, say, say_nothing
from dovecote.cli.system import database, routes
from dovecote.store.delivery_state import DeliveryState

if TYPE_CHECKING:
    from dovecote.operations.handlers import Handler, HandlerWithoutRoute

Name = Annotated[
    str, typer.Argument(help="The handler, such as billing.write_history.", autocompletion=complete_handler)
]


handlers = typer.Typer(no_args_is_help=True, help="Handlers: list them, pause and resume them.")


@handlers.command("list")
def list_(as_json: AsJson = False) -> None:
    """List handlers, their event types and pauses. `dovecote status` shows their progress.

    And those that no route has any more, with what is left of them in Postgres.

    Example: dovecote handlers list
    """
    with database() as engine:
        found = operations.handlers.list_handlers(engine, routes())
        left = operations.handlers.list_handlers_without_route(engine, routes())
    if as_json:
        print_json({"handlers": [jsonable(one) for one in found], "without_route": [jsonable(one) for one in left]})
        return
    print_listing(
        found,
        {
            "handler": lambda one: one.name,
            "queue": lambda one: one.queue,
            "events": lambda one: one.event_types,
            "kind": _kind,
            "paused": _paused,
        },
        if_empty="there are no handlers",
    )
    if left:
        say_nothing()
        say("no route has these any more (what to do: dovecote doctor)")
        print_listing(
            left,
            {
                "handler": lambda one: one.name,
                **{str(state): partial(_count, state) for state in DeliveryState},
                "subscriptions": lambda one: one.event_types,
                "": _flags,
            },
            if_empty="none",
        )


def _count(state: DeliveryState, one: HandlerWithoutRoute) -> str:
    return f"{getattr(one, state)}{'+' if state in one.at_least else ''}"


def _flags(one: HandlerWithoutRoute) -> str:
    flags = {"paused": one.is_paused, "queue was full": one.is_postponed}
    return ", ".join(word for word, holds in flags.items() if holds)


@handlers.command()
def pause(
    handler: Name,
    reason: Annotated[str, typer.Option(help="Why; it is written into the audit log, and shown by `status`.")],
    actor: Actor,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Let a handler act on nothing more. Its events and retries are kept until it is resumed.

    Example: dovecote handlers pause verification.send_code --reason "INC-12: the provider sends twice"
    """
    with database() as engine:
        changed = operations.handlers.pause(engine, routes(), handler, actor=actor, reason=reason, dry_run=dry_run)
    _report(changed, "would be paused" if dry_run else "is paused", dry_run, as_json)


@handlers.command()
def resume(
    handler: Name,
    actor: Actor,
    reason: Reason = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Let a paused handler go on, with what it has missed first.

    Example: dovecote handlers resume verification.send_code
    """
    with database() as engine:
        changed = operations.handlers.resume(engine, routes(), handler, actor=actor, reason=reason, dry_run=dry_run)
    _report(changed, "would be resumed" if dry_run else "goes on", dry_run, as_json)


def _report(handler: Handler, what: str, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({**jsonable(handler), "dry_run": dry_run})
    else:
        say(f"{handler.name} {what}")


def _kind(handler: Handler) -> str:
    words = {"ordered": handler.ordered, "bulk": handler.bulk, "replayable": handler.replayable}
    return ", ".join(word for word, holds in words.items() if holds)


def _paused(handler: Handler) -> str:
    pause = handler.paused
    return f"by {pause.actor} since {pause.since:%F %T %Z}: {pause.reason}" if pause else ""
