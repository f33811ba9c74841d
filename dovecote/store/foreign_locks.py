"""Foreign sessions that hold our locks: any login that may connect can take any advisory lock.

Nothing waits for an advisory lock for ever (docs/adr/0036-advisory-locks-and-privileges.md). Sessions
that hold one, or block a table without a privilege, are shown by the log of the relay, `status`, `doctor` and a metric.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

QUERY = "select purpose, locks, pid, login, application, prepared, mode from dovecote.foreign_locks()"


@dataclass(frozen=True)
class ForeignLock:
    """What one session, or one prepared transaction, holds of one purpose.

    purpose   announcement, wake-up, release, or table: held or waited for, and all wait behind it
    pid       None for a prepared transaction, whose name is `prepared`
    """

    purpose: str
    locks: int
    pid: int | None
    login: str | None
    application: str | None
    prepared: str | None
    mode: str

    def __str__(self) -> str:
        held = f"{self.locks} {self.purpose} lock{'s' if self.locks > 1 else ''} ({self.mode})"
        login = f"login {self.login or 'unknown'}"
        if self.prepared is not None:
            return f"prepared transaction {self.prepared!r} ({login}) holds {held}"
        return f"pid {self.pid} ({login}, application {self.application or 'unnamed'}) holds {held}"

    @property
    def cure(self) -> str:
        """The statement that ends it."""
        if self.prepared is not None:
            return f"rollback prepared '{self.prepared.replace(chr(39), 2 * chr(39))}'"
        return f"select pg_terminate_backend({self.pid})"


def foreign_locks(rows: Iterable[Iterable[Any]]) -> list[ForeignLock]:
    """Return what QUERY has found."""
    return [ForeignLock(*row) for row in rows]
