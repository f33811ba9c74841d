"""Remove expired personal data by the functions that slices register, in short transactions."""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import Engine

from dovecote.route import Purge
from dovecote.store.connections import sessions_for
from dovecote.unit_of_work import unit_of_work


def purge(engine: Engine, purges: Sequence[Purge]) -> int:
    """Run each purge until nothing is expired; return the number of rows removed. A kill loses no finished batch.

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
