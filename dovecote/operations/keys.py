"""The keys that messages are signed with: list, rotate, revoke. No secret leaves the database here.

The database guards them: functions that run as the owner, each with its own line in the audit log.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
import sqlalchemy.exc
from sqlalchemy import Engine, text

from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import WrongRequest, require_who_and_why

_LIST = text("select id, made_at, revoked_at, signs from dovecote.known_message_keys()")
_ROTATE = text("select dovecote.rotate_message_key(:actor, :reason)")
_REVOKE = text("select dovecote.revoke_message_key(:key, :actor, :reason)")
_WHY = "what a revoked key has signed is not acted on any more, and is sent again: say why, with --reason"


@dataclass(frozen=True)
class KnownKey:
    """A key without its secret. `signs`: the relay that leads signs with it, or will within a second."""

    id: str
    made_at: datetime
    revoked_at: datetime | None
    signs: bool


def list_message_keys(engine: Engine) -> list[KnownKey]:
    """Return every key, the newest first."""
    with snapshot(engine) as connection:
        return [KnownKey(**row._mapping) for row in connection.execute(_LIST)]


def rotate(engine: Engine, *, actor: str, reason: str | None = None, dry_run: bool = False) -> KnownKey | None:
    """Make a key, which relays sign with from the sixth second on; None for a dry run. Older ones stay valid.

    Errors: WrongRequest.
    """
    require_who_and_why(actor, reason)
    if dry_run:
        return None
    with engine.begin() as connection:
        made = connection.scalar(_ROTATE, {"actor": actor, "reason": reason})
        return next(key for key in _keys(connection) if key.id == made)


def revoke(engine: Engine, id: str, *, actor: str, reason: str | None, dry_run: bool = False) -> KnownKey:
    """Revoke the key: within ten seconds handlers act on nothing that it has signed. Return the key.

    A dry run finds out whether the database would do it.
    Errors: WrongRequest where there is no such key, or where it is the only one that all processes know.
    """
    require_who_and_why(actor, reason, why=_WHY)
    with engine.connect() as connection:
        try:
            connection.execute(_REVOKE, {"key": id, "actor": actor, "reason": reason})
        except sqlalchemy.exc.DBAPIError as error:
            refused = error.orig
            if isinstance(refused, psycopg.errors.NoDataFound | psycopg.errors.ObjectNotInPrerequisiteState):
                said = refused.diag
                raise WrongRequest(f"{said.message_primary}. {said.message_hint}") from error
            raise
        found = next(key for key in _keys(connection) if key.id == id)
        if dry_run:
            connection.rollback()
        else:
            connection.commit()
    return found


def _keys(connection: Any) -> list[KnownKey]:
    return [KnownKey(**row._mapping) for row in connection.execute(_LIST)]
