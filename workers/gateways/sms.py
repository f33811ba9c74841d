"""Text messages. Numbers and texts pass through here and are never logged; a log shows four digits."""

import os
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import repeat
from pathlib import Path
from threading import Lock
from typing import Protocol

import structlog

from domain.verification.phone import masked_phone
from dovecote.errors import GatewayUnavailable

# What a provider would remember for a day; 10,000 keys of 36 characters are about 1 MB.
_KEYS_REMEMBERED = 10_000

log = structlog.get_logger()


class SmsGateway(Protocol):
    def send(self, to: str, text: str, *, idempotency_key: str) -> None:
        """Send a text to a number in E.164; the same key again sends nothing more.

        Errors: GatewayUnavailable when it may work later.
        """


class ConsoleSms:
    """A provider for a machine that has none. It may be used from many threads.

    handset       file that stands for the phone's screen, one line a message: the only place where number
                  and code may be read, hence mode 0600. Without it messages are counted and gone.
    failures      one answer for each attempt, True for a failure; when they end, all is well
    failure_rate  share of attempts that fail by chance, where `failures` is not given

    It remembers idempotency keys of its own process only, the last 10,000 of them.
    """

    def __init__(
        self,
        handset: Path | None = None,
        *,
        failures: Iterator[bool] | None = None,
        failure_rate: float = 0.0,
    ) -> None:
        self.sent = 0
        self._handset = handset
        self._failures = failures if failures is not None else _by_chance(failure_rate)
        self._keys: dict[str, None] = {}
        self._lock = Lock()

    def send(self, to: str, text: str, *, idempotency_key: str) -> None:
        with self._lock:
            if idempotency_key in self._keys:
                return
            if next(self._failures, False):
                raise GatewayUnavailable("the console SMS gateway fails, as configured")
            self._show(to, text)
            self._remember(idempotency_key)
            self.sent += 1
        log.info("sms sent", to=masked_phone(to))

    def _show(self, to: str, text: str) -> None:
        if self._handset is None:
            return
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}  {to}  {' '.join(text.split())}\n"
        try:
            # One write in append mode: lines of several processes do not mix.
            screen = os.open(self._handset, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            try:
                os.fchmod(screen, 0o600)
                os.write(screen, line.encode())
            finally:
                os.close(screen)
        except OSError as error:
            raise GatewayUnavailable(f"the handset {self._handset} cannot be written: {error.strerror}") from error

    def _remember(self, idempotency_key: str) -> None:
        self._keys[idempotency_key] = None
        if len(self._keys) > _KEYS_REMEMBERED:
            del self._keys[next(iter(self._keys))]


def _by_chance(failure_rate: float) -> Iterator[bool]:
    return (random.random() < rate for rate in repeat(failure_rate))
