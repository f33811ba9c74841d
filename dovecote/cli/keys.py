"""`dovecote keys`: what relays sign messages with, so that handlers act on nothing else."""

from __future__ import annotations

from typing import Annotated

import typer

from dovecote import operations
from dovecote.cli.options import Actor, DryRun, Reason
from dovecote.cli.output import AsJson, jsonable, print_json, say
from dovecote.cli.system import database

keys = typer.Typer(no_args_is_help=True, help="The keys that messages are signed with.")


@keys.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the keys, newest first, without their secrets, which nothing shows.

    Example: dovecote keys list
    """
    with database() as engine:
        found = operations.keys.list_message_keys(engine)
    if as_json:
        print_json({"keys": [jsonable(key) for key in found]})
        return
    for key in found:
        state = f"revoked {key.revoked_at:%F %T}" if key.revoked_at else "signs" if key.signs else "valid"
        say(f"{key.id}  made {key.made_at:%F %T}  {state}")


@keys.command()
def rotate(actor: Actor, reason: Reason = None, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Make a new key. Relays sign with it from the sixth second on; what older keys have signed stays valid.

    Example: dovecote keys rotate --reason "every quarter"
    """
    with database() as engine:
        made = operations.keys.rotate(engine, actor=actor, reason=reason, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "key": jsonable(made)})
    elif made is None:
        say("would make a new key, which relays would sign with from the sixth second on")
    else:
        say(
            f"made key {made.id}; relays sign with it from the sixth second on, and what others have signed stays valid"
        )


@keys.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The key, as `dovecote keys list` shows it.")],
    actor: Actor,
    reason: Reason = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Have nothing acted on any more that this key has signed. The relay sends again what was queued.

    Where a secret may be known to others: `dovecote keys rotate`, ten seconds later revoke all older ones.

    Example: dovecote keys revoke 1f0c3a5b7d9e2468 --reason "a backup was stolen"
    """
    with database() as engine:
        key = operations.keys.revoke(engine, id, actor=actor, reason=reason, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "key": jsonable(key)})
    elif dry_run:
        say(f"would revoke key {key.id}")
    else:
        say(f"revoked key {key.id}: within ten seconds nothing is acted on that it has signed")
