"""`dovecote recover`: repair after a restore of Postgres or a changed sequence of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovecote import operations
from dovecote.cli.options import Actor, DryRun, Reason
from dovecote.cli.output import AsJson, print_json, say
from dovecote.cli.system import database, routes

if TYPE_CHECKING:
    from dovecote.operations.recover import Recovery


def recover(actor: Actor, reason: Reason = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Repair the sequence of positions, and have the relay send what it has not seen. Harmless where all is well.

    Needed where the relay refuses to lead: after a restore or a copy without the sequence, or when it was altered.

    Example: dovecote recover --dry-run
    """
    with database() as engine:
        found = operations.recover.recover(engine, routes(), actor=actor, reason=reason, dry_run=dry_run)
    if as_json:
        print_json(found)
    else:
        _report(found)


def _report(found: Recovery) -> None:
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
