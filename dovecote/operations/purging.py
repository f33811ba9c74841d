"""Remove personal data whose time is over: what a slice says may go, in short transactions."""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import Engine

from dovecote.route import Purge
from dovecote.store.connections import sessions_for
from dovecote.unit_of_work import unit_of_work


def purge(engine: Engine, purges: Sequence[Purge]) -> int:
    """Let each remove what is over by now, and return how many rows that were. A kill leaves whole batches done.

    Errors: DBAPIError, InsufficientPrivilege among them for a login that may not remove them.
    """
    sessions = sessions_for(engine)
    now = datetime.now(UTC)
    removed = 0
    for each in purges:
        while True:
            with unit_of_work(sessions) as uow:
                batch = each(uow, now)
            if not batch:
                break
            removed += batch
    return removed
