"""How many tries a challenge has left, remembered in Redis so that asking costs Postgres nothing.

Postgres is the truth and judges every answer; Redis may be slow, empty or gone at any time. So this
cache never raises because of Redis: what it cannot write or read is unknown.
"""

from datetime import datetime
from uuid import UUID

import structlog
from redis import Redis
from redis.exceptions import RedisError

from domain.verification import Challenges
from dovecote.unit_of_work import UnitOfWork

log = structlog.get_logger()

# Tries only ever get fewer, so the lower of two numbers is the newer one: a reader that was overtaken
# by an answer cannot put the old number back.
_KEEP_THE_LOWER = """
local known = tonumber(redis.call('GET', KEYS[1]))
if not known or tonumber(ARGV[1]) < known then
    redis.call('SET', KEYS[1], ARGV[1], 'PXAT', ARGV[2])
end
"""


class ChallengeCache:
    """Tries left by challenge. Give the client socket time-outs; without a client it knows nothing."""

    def __init__(self, client: Redis | None, namespace: str) -> None:
        self._client = client
        self._prefix = f"{namespace}:challenge:"
        self._keep_the_lower = client.register_script(_KEEP_THE_LOWER) if client else None

    def remember(self, challenge_id: UUID, tries_left: int, expires_at: datetime) -> None:
        """Keep the number until the challenge expires, unless a lower one is known."""
        if self._keep_the_lower is None:
            return
        try:
            self._keep_the_lower(keys=[self._key(challenge_id)], args=[tries_left, int(expires_at.timestamp() * 1000)])
        except RedisError as error:
            _warn("remember", challenge_id, error)

    def tries_left(self, challenge_id: UUID) -> int | None:
        """Return the number kept, or None if nothing is known."""
        if self._client is None:
            return None
        try:
            known = self._client.get(self._key(challenge_id))
        except (RedisError, UnicodeDecodeError) as error:
            _warn("look up", challenge_id, error)
            return None
        # Anybody who can write to Redis may have written it, and it is shown only. A client may decode.
        digits = known.encode() if isinstance(known, str) else known
        return int(digits) if isinstance(digits, bytes) and len(digits) <= 3 and digits.isdigit() else None

    def forget(self, challenge_id: UUID) -> None:
        """Drop what is known. Without Redis it expires with the challenge."""
        if self._client is None:
            return
        try:
            self._client.delete(self._key(challenge_id))
        except RedisError as error:
            _warn("forget", challenge_id, error)

    def _key(self, challenge_id: UUID) -> str:
        return f"{self._prefix}{challenge_id}"


def remaining_tries(uow: UnitOfWork, cache: ChallengeCache, challenge_id: UUID, at: datetime) -> int:
    """Return how many more answers would be judged: from the cache, else from Postgres.

    For showing, not for deciding: the cache follows an answer by the time its event takes.
    """
    known = cache.tries_left(challenge_id)
    if known is not None:
        return known
    challenge = Challenges(uow).find(challenge_id)
    if challenge is None:
        return 0
    cache.remember(challenge_id, challenge.tries_at(at), challenge.expires_at)
    return challenge.tries_at(at)


def _warn(action: str, challenge_id: UUID, error: Exception) -> None:
    log.warning(
        "challenge cache unavailable",
        action=action,
        challenge_id=str(challenge_id),
        error=f"{type(error).__name__}: {error}",
    )
