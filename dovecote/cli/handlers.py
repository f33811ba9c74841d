"""`dovecote handlers`: which there are, and pausing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dovecote.cli.options import Actor, DryRun, Reason, complete_handler
from dovecote.cli.output import AsJson, add_row, print_json, print_table, say, say_nothing
from dovecote.store.delivery_state import DeliveryState

if TYPE_CHECKING:
    from dovecote.operations import Handler, HandlerWithoutRoute


Name = Annotated[
    str, typer.Argument(help="The handler, such as billing.write_history.", autocompletion=complete_handler)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    commands = typer.Typer(no_args_is_help=True, help="Handlers: look at them, pause and resume them.")
    commands.command("list")(list_)
    commands.command()(pause)
    commands.command()(resume)
    app.add_typer(commands, name="handlers")


def list_(as_json: AsJson = False) -> None:
    """List the handlers, what each wants and which are paused. How far each is, `dovecote status` tells.

    And those that no route has any more, with what is left of them in Postgres.

    Example: dovecote handlers list
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        found = operations.handlers(engine, find_app().routes)
        left = operations.handlers_without_route(engine, find_app().routes)
    if as_json:
        print_json({"handlers": [one.as_json() for one in found], "without_route": [one.as_json() for one in left]})
        return
    table = Table("handler", "queue", "events", "kind", "paused", box=None, pad_edge=False)
    for one in found:
        add_row(table, one.name, one.queue, one.event_types, _kind(one), _paused(one))
    print_table(table, "there are no handlers")
    if left:
        say_nothing()
        say("no route has these any more (what to do: dovecote doctor)")
        print_table(_without_route(left), "none")


def _without_route(left: Sequence[HandlerWithoutRoute]) -> Table:
    table = Table("handler", *DeliveryState, "subscriptions", "", box=None, pad_edge=False)
    for one in left:
        counts = [f"{getattr(one, state)}{'+' if state in one.at_least else ''}" for state in DeliveryState]
        flags = {"paused": one.is_paused, "queue was full": one.is_postponed}
        words = ", ".join(word for word, holds in flags.items() if holds)
        add_row(table, one.name, *counts, one.event_types, words)
    return table


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
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        changed = operations.pause_handler(
            engine, find_app().routes, handler, actor=actor, reason=reason, dry_run=dry_run
        )
    _tell(changed, "would be paused" if dry_run else "is paused", dry_run, as_json)


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
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        changed = operations.resume_handler(
            engine, find_app().routes, handler, actor=actor, reason=reason, dry_run=dry_run
        )
    _tell(changed, "would be resumed" if dry_run else "goes on", dry_run, as_json)


def _tell(handler: Handler, what: str, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({**handler.as_json(), "dry_run": dry_run})
    else:
        say(f"{handler.name} {what}")


def _kind(handler: Handler) -> str:
    words = {"ordered": handler.ordered, "bulk": handler.bulk, "replayable": handler.replayable}
    return ", ".join(word for word, holds in words.items() if holds)


def _paused(handler: Handler) -> str:
    pause = handler.paused
    return f"by {pause.by} since {pause.since:%F %T %Z}: {pause.reason}" if pause else ""
