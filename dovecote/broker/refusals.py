"""What is told of refused messages: each kind at once, and a flood of them in a line a minute."""

import threading
import time

import structlog

from dovecote.envelope.message_reader import RefusedMessage

log = structlog.get_logger()

_TOLD_AGAIN_SECONDS = 60.0


class Refusals:
    """Tells for one process; safe to use from many threads."""

    def __init__(self) -> None:
        # When a kind was told last, and how many have come since. Queues are ours, and reasons are few.
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def tell(self, queue: str, id: bytes, refused: RefusedMessage) -> None:
        """Log the refusal, or count it for the next line."""
        kind = queue, refused.reason
        now = time.monotonic()
        with self._lock:
            told_at, untold = self._told.get(kind, (float("-inf"), 0))
            is_time = now - told_at >= _TOLD_AGAIN_SECONDS
            self._told[kind] = (now, 0) if is_time else (told_at, untold + 1)
        if is_time:
            log.error(
                "message refused: nobody acts on it, and its events, if any, are in the outbox",
                queue=queue,
                reason=refused.reason,
                why=str(refused),
                message_id=ascii(id[:64].decode(errors="replace")).strip("'"),
                others_since_last_line=untold,
            )
