"""`dovecote recover`: after Postgres went back in time, or somebody changed the sequence of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from dovecote.cli.options import Actor, DryRun, Reason
from dovecote.cli.output import AsJson, print_json, say

if TYPE_CHECKING:
    from dovecote.operations import Recovery


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(recover)


def recover(actor: Actor, reason: Reason = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Repair the sequence of positions, and have the relay send what it has not seen. Harmless where all is well.

    Needed where the relay refuses to lead: after a restore or a copy without the sequence, or when it was altered.

    Example: dovecote recover --dry-run
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        found = operations.recover(engine, find_app().routes, actor=actor, reason=reason, dry_run=dry_run)
    if as_json:
        print_json(found.as_json())
    else:
        _tell(found)


def _tell(found: Recovery) -> None:
    if found.fault is None and not found.unread:
        say(f"nothing to do: positions are handed out in order, {found.handed_out} was the last, and all were read")
        return
    would = "would " if found.dry_run else ""
    if found.fault is not None:
        say(f"found: {found.fault.removesuffix('; run `dovecote recover`')}")
    say(f"the sequence {would or 'now '}go{'' if would else 'es'} on after {found.continues_after}, one by one")
    more = "+" if "unread" in found.at_least else ""
    say(f"{found.unread}{more} events that the relay had passed {would or 'now '}get new positions, and are sent:")
    for handler, events in found.sent_again.items():
        say(f"  at least {events} to {handler}")
    say(
        f"a relay {'would take' if found.dry_run else 'takes'} over within some seconds, and sends whatever else is "
        "neither processed nor in deliveries"
    )
