"""The audit log: who did what, why, to how much. A verb's function writes its line with its change (migration 0029).

The database adds the time and the login itself, and lets nobody but the owner change a line.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text

from dovecote.operations.page import Page, read_cursor
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import require_range


@dataclass(frozen=True)
class AuditEntry:
    """One line. `actor` is the name that was given; only `login`, the database login of the session, is proof."""

    id: UUID
    at: datetime
    actor: str
    login: str
    action: str
    reason: str | None
    affected: int | None
    details: dict[str, Any]


_LIST = text(
    """
    select id, at, actor, login, action, reason, affected, details from dovecote.audit_log
    where id < coalesce(cast(:before as uuid), 'ffffffff-ffff-ffff-ffff-ffffffffffff')
      and id >= dovecote.uuid_v7_lower_bound(coalesce(cast(:since as timestamptz), 'epoch'))
      and (cast(:action as text) is null or action = :action or action like :action || '.%')
      and (cast(:actor as text) is null or actor = :actor or login = :actor)
    order by id desc limit :limit
    """
)


def list_audit_entries(
    engine: Engine,
    *,
    action: str | None = None,
    actor: str | None = None,
    since: datetime | None = None,
    before: str | None = None,
    limit: int = 50,
) -> Page[AuditEntry]:
    """Return lines, newest first. `action` may be a subject (`deliveries`), `actor` a given name or a login.

    Errors: WrongRequest; BadCursor where `before` is not a page's `next`.
    """
    require_range(since, None)
    [before_id] = read_cursor(before, UUID, first=[None])
    with snapshot(engine) as connection:
        found = connection.execute(
            _LIST, {"action": action, "actor": actor, "since": since, "before": before_id, "limit": limit + 1}
        ).all()
    return Page.of([AuditEntry(**row._mapping) for row in found], limit, lambda entry: [entry.id])
