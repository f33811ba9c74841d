"""Repair the sequence of positions after Postgres was restored, replicated or altered, and send what was not seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import psycopg
import sqlalchemy.exc
from sqlalchemy import Connection, Engine, text

from dovecote.errors import DovecoteError
from dovecote.operations.validation import changing, require_who_and_why
from dovecote.route import Route

# Of these more are counted as "at least".
_MAX_EVENTS = 100_000


class CannotRecover(DovecoteError):
    """An open transaction prevents it; the message names it. Nothing was changed."""


@dataclass(frozen=True)
class Recovery:
    """What `recover` did, or would do.

    fault        what was wrong with the sequence; None when nothing was
    handed_out   the highest position that the sequence had handed out
    continues_after  the position after which it goes on: the highest known one
    unread       events that the relay had passed; they get positions above `continues_after`, and are sent as new
    sent_again   the same by handler; a relay that takes over sends whatever else is neither processed nor in
                 `deliveries`, so these are the least
    at_least     which of these numbers may be larger: more was there than is looked at
    changed      False when there is nothing to do, and in a dry run
    """

    dry_run: bool
    changed: bool
    fault: str | None
    handed_out: int
    continues_after: int
    unread: int
    sent_again: dict[str, int]
    at_least: list[str]


_STATE = text("select handed_out, highest_known, dovecote.sequence_fault() as fault from dovecote.sequence_state()")
_UNREAD = text(
    """
    select event_type, count(*) as events from (select event_type from dovecote.never_read() limit :most) as unread
    group by event_type
    """
)
# A database may say otherwise for its sessions; what others commit while we wait for the lock has to be seen.
_READ_COMMITTED = text("set transaction isolation level read committed")
_RECOVER = text("select renumbered from dovecote.recover(:actor, :reason)")


def recover(
    engine: Engine, routes: Sequence[Route], *, actor: str, reason: str | None = None, dry_run: bool = False
) -> Recovery:
    """Set the sequence above every known position, and have the relay read what it has not seen.

    Writers wait until it ends. A leading relay begins anew within ten seconds.
    On a system that is well nothing is changed.
    Errors: WrongRequest; CannotRecover while a transaction that has written stays open.
    """
    require_who_and_why(actor, reason)
    with changing(engine, CannotRecover) as connection:
        connection.execute(_READ_COMMITTED)
        found = _look(connection, routes, dry_run)
        if dry_run or (found.fault is None and not found.unread):
            return found
        try:
            renumbered = connection.execute(_RECOVER, {"actor": actor, "reason": reason}).scalar_one()
        except sqlalchemy.exc.OperationalError as error:
            if isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise CannotRecover(
                    "a transaction that has written to the outbox stays open, and what it wrote has to be seen: end it "
                    "(`dovecote doctor` shows who it is at relay.writers), then run this again; nothing was changed"
                ) from error
            raise
    return found if renumbered is None else replace(found, changed=True, unread=max(found.unread, renumbered))


def _look(connection: Connection, routes: Sequence[Route], dry_run: bool) -> Recovery:
    state = connection.execute(_STATE).one()
    unread = {row.event_type: row.events for row in connection.execute(_UNREAD, {"most": _MAX_EVENTS})}
    events = sum(unread.values())
    return Recovery(
        dry_run=dry_run,
        changed=False,
        fault=state.fault,
        handed_out=state.handed_out,
        continues_after=state.highest_known,
        unread=events,
        sent_again={
            route.handler: sum(unread.get(event_type, 0) for event_type in route.event_types) for route in routes
        },
        at_least=["unread", "sent_again"] if events == _MAX_EVENTS else ["sent_again"] if state.fault or events else [],
    )
