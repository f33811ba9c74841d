"""One run of one Postgres, as dovecote.server_run() returns it. Another run may have lost what this one committed."""

from dataclasses import dataclass
from datetime import UTC, datetime

from dovecote.store.envelopes import Connection

# It is read from Redis as well, where any client may have written it: four numbers of 64 bits, and no year beyond 9999.
_MAX_LENGTH, _LATEST_US = 90, 253_402_000_000 * 1_000_000


@dataclass(frozen=True)
class Run:
    """`started_us` is Unix time; `database` is its number within the server, 0 for a run without one."""

    system: int
    timeline: int
    started_us: int
    database: int = 0

    @classmethod
    def read(cls, text: str | None) -> "Run | None":
        """Return None for what is no run."""
        words = (text or "").split() if len(text or "") <= _MAX_LENGTH else []
        if len(words) < 3 or not all(word.isascii() and word.isdecimal() for word in words[:4]):
            return None
        found = cls(*(int(word) for word in words[:4]))
        return found if found.started_us <= _LATEST_US else None

    def is_newer_than(self, other: "Run") -> bool:
        """Return whether this is the newer of two databases that may have been one; False for the same one.

        A promoted standby may have been started before its primary was: its timeline is higher.
        """
        if self.system != other.system:
            return self.started_us > other.started_us
        ours = (self.timeline, self.started_us, self.database)
        return ours > (other.timeline, other.started_us, other.database)

    def __str__(self) -> str:
        started = datetime.fromtimestamp(self.started_us / 1e6, UTC)
        return f"Postgres {self.system}, timeline {self.timeline}, started {started:%F %T} UTC"


def server_run(connection: Connection) -> str:
    """Return the run of Postgres that this session belongs to; the session cannot outlive it."""
    (run,) = connection.execute("select dovecote.server_run()").fetchone() or ("",)
    return str(run)


def outbox_run(connection: Connection) -> str:
    """Return the run of Postgres, and of the outbox in it, that this session reads from."""
    (run,) = connection.execute("select dovecote.outbox_run()").fetchone() or ("",)
    return str(run)
