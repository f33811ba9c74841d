"""The audit log: who did what, why, to how much. A verb writes its line in the transaction of its change.

The database adds the moment and the login itself, and lets nobody but the owner change a line.
"""

import getpass
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, text

from domain.database import DURABLE
from workers.operations.asking import require_range
from workers.operations.reading import snapshot


@dataclass(frozen=True)
class AuditEntry:
    """One line. `actor` is the name that was given, `login` the database login that was authenticated."""

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


# Every verb writes its line: what an operator was told is done, is not lost in a crash.
_RECORD = text(
    f"""
    insert into dovecote.audit_log (actor, action, reason, affected, details)
    select :actor, :action, :reason, :affected, cast(:details as jsonb) from (select {DURABLE}) as durable
    """  # noqa: S608 - put together from constants
)

_LIST = text(
    """
    select id, at, actor, login, action, reason, affected, details from dovecote.audit_log
    where id < coalesce(cast(:before as uuid), 'ffffffff-ffff-ffff-ffff-ffffffffffff')
      and id >= dovecote.uuid_v7_floor(coalesce(cast(:since as timestamptz), 'epoch'))
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


def record(
    connection: Connection,
    *,
    actor: str,
    action: str,
    reason: str | None = None,
    affected: int | None = None,
    details: Mapping[str, object] | None = None,
) -> None:
    """Write a line in the transaction at hand. `action` is <subject>.<verb>, `details` the filter and the like."""
    connection.execute(
        _RECORD,
        {
            "actor": actor,
            "action": action,
            "reason": reason,
            "affected": affected,
            "details": json.dumps(dict(details or {}), default=str),
        },
    )


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
