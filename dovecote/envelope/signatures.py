"""Signatures: a relay signs the messages that it sends, and consumers act on no others.

Redis stores messages and is not trusted. A signature is a keyed digest (HMAC-SHA-256) over all bytes of
the message before it: handler, queue, id, options and every envelope. It stands at a fixed place, the end, so it is
compared before anything is parsed. The keys are in Postgres (dovecote.message_keys), readable by relays and consumers
alone, and each purpose has a key of its own that is derived from them.
"""

import hmac
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import psycopg
from sqlalchemy import text

from dovecote.database import Sessions
from dovecote.envelope.wire import AFTER_SIGNATURE, BEFORE_SIGNATURE, DIGEST_BYTES, KEY_ID_BYTES, TAIL_BYTES
from dovecote.errors import DovecoteError

# A relay signs with a key once it is this old, by the clock of Postgres, and a consumer asks for a key that it does not
# know if it has not asked for this long: whatever a relay signs, a consumer that has asked lately knows the key. So a
# flood of made-up key ids costs Postgres one question in that time, and an honest message no wait.
_AGE_SECONDS, _ASK_AGAIN_SECONDS = 5, 3.0
# How long a key that was revoked may still be taken.
_POLL_INTERVAL_SECONDS = 10.0
# While Postgres is away.
_PAUSE_SECONDS = 1.0

_VALID = "select id, secret from dovecote.message_keys where revoked_at is null"
_SIGNING_FIRST = f"""
    {_VALID} order by greatest(made_at, statement_timestamp() - interval '{_AGE_SECONDS} seconds'), made_at desc, id
"""


class NoMessageKey(DovecoteError):
    """A relay has no key to sign with, so no consumer would accept its messages."""

    def __init__(self) -> None:
        super().__init__("dovecote.message_keys has no key to sign messages with: run `dovecote keys rotate`")


@dataclass(frozen=True)
class MessageKey:
    """One key: `id` as it stands in messages, and what is derived from its secret for each purpose."""

    id: bytes
    _for_messages: bytes = field(repr=False)
    _for_crash_counts: bytes = field(repr=False)

    @classmethod
    def of(cls, id: str, secret: bytes) -> "MessageKey":
        """Return the key of a row of message_keys."""
        derived = (
            hmac.digest(secret, context, "sha256") for context in (b"dovecote message", b"dovecote crash counts")
        )
        return cls(id.encode("ascii"), *derived)

    def signed(self, unsigned: bytes) -> bytes:
        """Return the message whole. `unsigned` is all of it up to END, which is left out."""
        return b"".join((unsigned, BEFORE_SIGNATURE, self.id, _digest(self._for_messages, unsigned), AFTER_SIGNATURE))

    def has_signed(self, message: bytes) -> bool:
        """Return whether the message is whole and as this key has signed it."""
        digest = _digest(self._for_messages, memoryview(message)[:-TAIL_BYTES])
        expected = b"".join((BEFORE_SIGNATURE, self.id, digest, AFTER_SIGNATURE))
        return hmac.compare_digest(message[-TAIL_BYTES:], expected)

    def sign_crash_counts(self, message_id: str, counts: bytes) -> bytes:
        """Return the crash counts with a signature behind them that holds for this message."""
        return b"".join((counts, b"\n", self.id, self._crash_counts_digest(message_id, counts)))

    def has_signed_crash_counts(self, message_id: str, counts: bytes, digest: bytes) -> bool:
        """Return whether the crash counts are as this key has signed them for this message."""
        return hmac.compare_digest(digest, self._crash_counts_digest(message_id, counts))

    def _crash_counts_digest(self, message_id: str, counts: bytes) -> bytes:
        return _digest(self._for_crash_counts, b"\n".join((message_id.encode(), counts)))


def _digest(key: bytes, data: bytes | memoryview) -> bytes:
    return hmac.digest(key, data, "sha256").hex().encode()


def key_id_of(message: bytes) -> bytes | None:
    """Return the id of the key that a message names; None where it is not signed."""
    tail = message[-TAIL_BYTES:]
    if len(tail) < TAIL_BYTES or not (tail.startswith(BEFORE_SIGNATURE) and tail.endswith(AFTER_SIGNATURE)):
        return None
    return tail[len(BEFORE_SIGNATURE) :][:KEY_ID_BYTES]


def split_crash_counts(found: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Return crash counts, the id of the key that they name, and their digest; None for what is not signed."""
    at = len(found) - KEY_ID_BYTES - DIGEST_BYTES
    if at < 1 or found[at - 1 : at] != b"\n":
        return None
    return found[: at - 1], found[at : at + KEY_ID_BYTES], found[at + KEY_ID_BYTES :]


def valid_keys(connection: psycopg.Connection[Any]) -> dict[bytes, MessageKey]:
    """Return every key that is not revoked, by its id; first the one to sign with: the newest that consumers know.

    Errors: NoMessageKey; psycopg.Error.
    """
    keys = {key.id: key for key in (MessageKey.of(*row) for row in connection.execute(_SIGNING_FIRST).fetchall())}
    if not keys:
        raise NoMessageKey
    return keys


def newest_key(connection: psycopg.Connection[Any]) -> MessageKey:
    """Return the key to sign with. Errors: NoMessageKey; psycopg.Error."""
    return next(iter(valid_keys(connection).values()))


class SigningKeys:
    """The keys as the leading relay knows them: the one to sign with, and whether any was revoked.

    Errors: NoMessageKey, psycopg.Error, when it is made and in `refresh`.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._keys = valid_keys(connection)

    @property
    def newest(self) -> MessageKey:
        """The key to sign with."""
        return next(iter(self._keys.values()))

    def refresh(self) -> bool:
        """Read the keys again; return whether one was revoked. Consumers refuse what is queued and signed with it."""
        before, self._keys = self._keys, valid_keys(self._connection)
        return not before.keys() <= self._keys.keys()


class MessageKeys:
    """The keys that a consumer takes, as Postgres has them; safe to use from many threads.

    Errors: those of Postgres, in all methods, where a key is not known that must be asked for.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._keys: dict[bytes, MessageKey] = {}
        self._newest: MessageKey | None = None
        self._asked_at = self._tried_at = float("-inf")
        self._lock = threading.Lock()

    def find(self, id: bytes) -> MessageKey | None:
        """Return the key of this id; None where there is none, or where it was revoked."""
        found = self._keys.get(id)
        if found is None:
            with self._lock:
                if time.monotonic() - self._asked_at >= _ASK_AGAIN_SECONDS:
                    self._ask()
                return self._keys.get(id)
        if time.monotonic() - max(self._asked_at + _POLL_INTERVAL_SECONDS, self._tried_at + _PAUSE_SECONDS) >= 0:
            self._look()
            found = self._keys.get(id)
        return found

    def newest(self) -> MessageKey:
        """Return the key to sign crash counts with. Errors: NoMessageKey besides."""
        if self._newest is None:
            with self._lock:
                self._ask()
        if self._newest is None:
            raise NoMessageKey
        return self._newest

    def _look(self) -> None:
        """Find out what was revoked, in one thread; the others go on with what is known, as all do in an outage."""
        if self._lock.acquire(blocking=False):
            try:
                self._tried_at = time.monotonic()
                self._ask()
            except Exception:
                return  # nothing is committed meanwhile either, so nothing is lost by taking what was known
            finally:
                self._lock.release()

    def _ask(self) -> None:
        with self._sessions() as session:
            rows = session.execute(text(_VALID + " order by made_at, id")).all()
        # In this order: what is read without the lock is one or the other, and whole.
        self._keys = {key.id: key for key in (MessageKey.of(id, bytes(secret)) for id, secret in rows)}
        self._newest = next(reversed(self._keys.values()), None)
        self._asked_at = time.monotonic()
