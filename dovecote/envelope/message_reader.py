"""Reads messages in a consumer: verifies that a relay made them, and parses them.

Nothing in a message is trusted before: neither its handler nor its queue, id, arguments or options. A message that no
relay made is refused: it goes to the dead letters of its queue, which are bounded, and never comes back. Its events, if
it has any, are in the outbox, and the relay sends those that were not handled again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar
from uuid import UUID

import structlog
from sqlalchemy import text

from dovecote.database import Sessions
from dovecote.envelope import Broken, Contents, Envelope, read_bundle
from dovecote.envelope.signatures import MessageKeys, key_id_of
from dovecote.errors import DovecoteError
from dovecote.privacy import Keyring

log = structlog.get_logger()

Result = TypeVar("Result")

# Of lines that cannot be read, the events in the outbox.
_AS_WRITTEN = text("""
    select id, position, event_type, aggregate_type, aggregate_id, created_at
    from dovecote.outbox where id = any(:ids) order by position
""")


@dataclass(frozen=True)
class Received:
    """A message as it was in Redis, where any client may have put it.

    queue, id  where it was found, and under which id: not what it claims
    crashes    how many processes died while they handled it, according to Redis
    """

    queue: str
    id: str
    data: bytes = field(repr=False)
    crashes: int = 0


class RefusedMessage(DovecoteError):
    """No relay made this message as it is. `reason` is one of a few words, for a metric."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Hold(Protocol):
    """Does some work, again and again while Postgres is away."""

    def __call__(self, work: Callable[[], Result], /) -> Result: ...


class MessageReader:
    """Reads messages for one process; safe to use from many threads."""

    def __init__(self, sessions: Sessions, keys: MessageKeys, keyring: Keyring | None, hold: Hold) -> None:
        self._sessions = sessions
        self._keys = keys
        self._keyring = keyring
        self._hold = hold

    def open(self, received: Received, its_queue: str | None = None) -> Contents:
        """Return what a relay has put into the message, for this queue and under this id.

        `its_queue` is the queue that the handler's route names today: there, too, its messages may be, for the relay
        moves them as they are when a queue is renamed.
        Errors: RefusedMessage; those of `hold`.
        """
        if (refusal := self._hold(partial(self._refusal, received.data))) is not None:
            raise refusal
        try:
            contents = read_bundle(received.data, self._keyring)
        except (ValueError, TypeError, RecursionError) as error:
            raise RefusedMessage("unreadable", f"a relay signed it, and it cannot be read: {error}") from error
        if received.queue not in (contents.queue, its_queue) or contents.id != received.id:
            raise RefusedMessage("misplaced", f"it was made for queue {contents.queue!r}, as {contents.id}")
        if contents.broken:
            contents.envelopes.extend(self._hold(partial(self._as_written, contents)))
        return contents

    def _refusal(self, data: bytes) -> RefusedMessage | None:
        key_id = key_id_of(data)
        if key_id is None:
            return RefusedMessage("unsigned", "it is not signed: no relay of this version made it")
        key = self._keys.find(key_id)
        if key is None:
            return RefusedMessage("unknown_key", "it is signed with a key that is not in use, or was revoked")
        if not key.has_signed(data):
            return RefusedMessage("forged", "its signature is not that of its content")
        return None

    def _as_written(self, contents: Contents) -> Sequence[Envelope]:
        """Return the events of lines that are no envelopes; each fails for its handler, which records it."""
        problems = {one.event_id: one.problem for one in contents.broken if one.event_id is not None}
        with self._sessions() as session:
            rows = session.execute(_AS_WRITTEN, {"ids": list(problems)}).all() if problems else []
        for one in contents.broken:
            self._report(contents, one, {row.id for row in rows})
        return [
            Envelope(
                event_id=row.id,
                type=row.event_type,
                aggregate_type=row.aggregate_type,
                aggregate_id=row.aggregate_id,
                position=row.position,
                time=row.created_at.isoformat(),
                data={},
                unreadable=problems[row.id],
            )
            for row in rows
        ]

    @staticmethod
    def _report(contents: Contents, line: Broken, known: set[UUID]) -> None:
        if line.event_id in known:
            return  # the failure of its event is recorded
        log.error(
            "a line of a message is no envelope, and names no event of the outbox; the other lines are handled",
            handler=contents.handler,
            message_id=contents.id,
            event_id=str(line.event_id) if line.event_id else None,
            problem=line.problem[:200],
        )
