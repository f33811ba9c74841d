"""`dovecote aggregates`: list blocked aggregates."""

from __future__ import annotations

from typing import Annotated

import typer

from dovecote import operations
from dovecote.cli.options import Handler, Limit
from dovecote.cli.output import AsJson, render
from dovecote.cli.system import database, routes

aggregates = typer.Typer(no_args_is_help=True, help="Look at blocked aggregates.")


@aggregates.command()
def blocked(
    handler: Handler = None,
    limit: Limit = 50,
    after: Annotated[str | None, typer.Option(help="Go on where a page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show blocked aggregates: the event that blocks each, and how many events wait behind it.

    Example: dovecote aggregates blocked
    """
    with database() as engine:
        page = operations.aggregates.list_blocked_aggregates(
            engine, routes(), handler=handler, limit=limit, after=after
        )
    render(
        page,
        {
            "handler": lambda one: one.handler,
            "aggregate": lambda one: f"{one.aggregate_type} {one.aggregate_id}",
            "held up by": lambda one: one.event_id,
            "state": lambda one: one.state,
            "waiting": lambda one: f"{one.waiting}{'+' if one.at_least else ''}",
            "since": lambda one: f"{one.since:%F %T}",
            "error": lambda one: f"{one.fingerprint} {one.error}" if one.error else None,
        },
        name="aggregates",
        option="after",
        if_empty="no aggregate is blocked",
        as_json=as_json,
    )
