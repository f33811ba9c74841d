"""The audit log: who did what, why, to how much. A verb's function writes its line with its change (migration 0029).

The database adds the moment and the login itself, and lets nobody but the owner change a line.
"""

import getpass
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text

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


@dataclass(frozen=True)
class AuditPage:
    """Lines, newest first; `before` is the id to go on from, None at the end."""

    entries: list[AuditEntry]
    before: UUID | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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


def whoever() -> str:
    """Return who sits here, as the operating system knows it: user@host."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number that no name belongs to; KeyError before Python 3.13
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def audit(
    engine: Engine,
    *,
    action: str | None = None,
    actor: str | None = None,
    since: datetime | None = None,
    before: UUID | None = None,
    limit: int = 50,
) -> AuditPage:
    """Return lines, newest first. `action` may be a subject (`deliveries`), `actor` a given name or a login.

    Errors: WrongRequest.
    """
    require_range(since, None)
    with snapshot(engine) as connection:
        found = connection.execute(
            _LIST, {"action": action, "actor": actor, "since": since, "before": before, "limit": limit + 1}
        ).all()
    entries = [AuditEntry(**row._mapping) for row in found[:limit]]
    return AuditPage(entries, entries[-1].id if len(found) > limit else None)
