"""`dovecote audit`: what operators did."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dovecote import operations
from dovecote.cli.options import Before, Limit, Since
from dovecote.cli.output import AsJson, render
from dovecote.cli.system import database


def audit(
    action: Annotated[str | None, typer.Option(help="Only this: deliveries.retry, or all of deliveries.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only what this name or login did.")] = None,
    since: Since = None,
    limit: Limit = 50,
    before: Before = None,
    as_json: AsJson = False,
) -> None:
    """Show who did what, why and to how much, newest first.

    Example: dovecote audit --action deliveries --since 1d
    """
    with database() as engine:
        page = operations.audit.list_audit_entries(
            engine, action=action, actor=actor, since=since, before=before, limit=limit
        )
    render(
        page,
        {
            "when": lambda one: f"{one.at:%F %T}",
            "who": lambda one: one.actor,
            "login": lambda one: one.login,
            "what": lambda one: one.action,
            "how many": lambda one: one.affected,
            "why": lambda one: one.reason,
            "details": lambda one: json.dumps(one.details) if one.details else None,
        },
        name="entries",
        if_empty="nothing was done",
        as_json=as_json,
    )
