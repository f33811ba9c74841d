"""Logs refused messages: the first of a kind at once, and a flood of them in a line a minute."""

import threading
import time

import structlog

from dovecote.envelope.message_reader import RefusedMessage

log = structlog.get_logger()

_LOG_INTERVAL_SECONDS = 60.0


class Refusals:
    """The log of one process; safe to use from many threads."""

    def __init__(self) -> None:
        # When a kind was logged last, and how many have come since. Queues are ours, and reasons are few.
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def log(self, queue: str, id: bytes, refused: RefusedMessage) -> None:
        """Log the refusal, or count it for the next line."""
        kind = queue, refused.reason
        now = time.monotonic()
        with self._lock:
            logged_at, unlogged = self._logged.get(kind, (float("-inf"), 0))
            is_time = now - logged_at >= _LOG_INTERVAL_SECONDS
            self._logged[kind] = (now, 0) if is_time else (logged_at, unlogged + 1)
        if is_time:
            log.error(
                "message refused: it is not acted on, and its events, if any, are in the outbox",
                queue=queue,
                reason=refused.reason,
                why=str(refused),
                message_id=ascii(id[:64].decode(errors="replace")).strip("'"),
                others_since_last_line=unlogged,
            )
