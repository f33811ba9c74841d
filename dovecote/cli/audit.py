"""`dovecote audit`: what operators did."""

import json
from typing import Annotated
from uuid import UUID

import typer
from rich.table import Table

from dovecote.cli.options import Limit, Since, identifier
from dovecote.cli.output import AsJson, add_row, print_json, print_table, say


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(audit)


def audit(
    action: Annotated[str | None, typer.Option(help="Only this: deliveries.retry, or all of deliveries.")] = None,
    actor: Annotated[str | None, typer.Option("--by", help="Only what this name or login did.")] = None,
    since: Since = None,
    limit: Limit = 50,
    before: Annotated[str | None, typer.Option(help="Go on where a page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who did what, why and to how much, newest first.

    Example: dovecote audit --action deliveries --since 1d
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.store.engines import engine_during

    cursor: UUID | None = identifier(before) if before else None
    with engine_during(load_settings(needs_redis=False)) as engine:
        page = operations.audit(engine, action=action, actor=actor, since=since, before=cursor, limit=limit)
    if as_json:
        print_json(page.as_json())
        return
    table = Table("when", "who", "login", "what", "how many", "why", "details", box=None, pad_edge=False)
    for one in page.entries:
        add_row(
            table,
            f"{one.at:%F %T}",
            one.actor,
            one.login,
            one.action,
            "" if one.affected is None else str(one.affected),
            one.reason or "",
            json.dumps(one.details) if one.details else "",
        )
    print_table(table, "nothing was done")
    if page.before:
        say(f"more: --before {page.before}")
