"""Is this process alive, and is all there that it needs? Asked of the servers for real, when somebody asks here.

A report is JSON: {"status", "missing": [names], "dependencies": {name: {"status": "up" or "down", "since", "detail"}},
"timestamp"}. Times are ISO 8601 in UTC. It is answered with 200 where nothing is missing, else with 503.
`detail` is there only while a dependency is up. What is wrong names servers, logins and versions: the log says that.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import psycopg
import structlog

from dovecote.broker.redis_client import connect_redis
from dovecote.errors import DovecoteError
from dovecote.exporter.http import Page
from dovecote.masking import masked
from dovecote.migrations import revisions
from dovecote.processes.threads import begin
from dovecote.settings import Settings
from dovecote.store.connections import connection_parameters

log = structlog.get_logger()

#: How long a process may be without a sign of life. A loop gives one every few seconds.
FRESH_SECONDS = 60.0
#: Longest wait for a server. libpq knows no less.
LIMIT_SECONDS = 2

# More frequent requests get the same answer.
_KEPT_SECONDS = 1.0


class Missing(DovecoteError):
    """It is not there; the message says what is wrong with it."""


class Dependency:
    """Something this process needs. The check returns a detail for strangers, and raises what it raises if it fails."""

    def __init__(self, name: str, check: Callable[[], str]) -> None:
        self._name = name
        self._check = check
        self._lock = threading.Lock()
        self._asked: Future[tuple[str, str]] | None = None
        self._asked_at = 0.0
        self._status, self._since, self._logged = "", _now(), ""

    def ask(self) -> None:
        """Begin to find out, unless that was done just now or is still going on. Returns at once."""
        with self._lock:
            is_asking = self._asked is not None and not self._asked.done()
            if not is_asking and time.monotonic() - self._asked_at >= _KEPT_SECONDS:
                self._asked, self._asked_at = begin(self._find_out, "health"), time.monotonic()

    def answer(self, until: float) -> dict[str, str]:
        """Return what was found, waiting for it until this time.monotonic()."""
        assert self._asked is not None, "it was asked before"
        try:
            status, detail = self._asked.result(max(0.0, until - time.monotonic()))
        except TimeoutError:
            status, detail = "down", f"no answer within {LIMIT_SECONDS} s"
        with self._lock:
            is_news = status != self._status
            if is_news:
                self._status, self._since = status, _now()
            if status == "down" and (is_news or detail != self._logged):
                self._logged = detail
                log.warning("something is missing", what=self._name, error=detail)
            shown = {"detail": detail} if detail and status == "up" else {}
            return {"status": status, "since": self._since, **shown}

    def _find_out(self) -> tuple[str, str]:
        try:
            return "up", self._check()
        except Exception as error:
            sentence = str(error).strip() or type(error).__name__
            return "down", masked(sentence.splitlines()[0])


def health(dependencies: Mapping[str, Callable[[], str]], well: str) -> Callable[[], Page]:
    """Return a page about these; its status is `well`, or `not` and that."""
    known = {name: Dependency(name, check) for name, check in dependencies.items()}

    def page() -> Page:
        for dependency in known.values():
            dependency.ask()
        until = time.monotonic() + LIMIT_SECONDS
        found = {name: dependency.answer(until) for name, dependency in known.items()}
        missing = [name for name, check in found.items() if check["status"] == "down"]
        report: dict[str, Any] = {
            "status": f"not {well}" if missing else well,
            "missing": missing,
            "dependencies": found,
            "timestamp": _now(),
        }
        return Page(503 if missing else 200, "application/json", orjson.dumps(report) + b"\n")

    return page


def servers(settings: Settings, migration_locations: Sequence[Path]) -> dict[str, Callable[[], str]]:
    """Return the checks of what every process needs; each makes a connection of its own and ends it."""
    parameters = connection_parameters(settings.database.url.get_secret_value(), {}, application_name="dovecote health")
    is_current = False

    def ask(query: str) -> Any:
        with psycopg.connect(autocommit=True, **{**parameters, "connect_timeout": LIMIT_SECONDS}) as connection:
            (answer,) = connection.execute(query).fetchone() or (None,)
            return answer

    def postgres() -> str:
        ask("select null")
        return ""

    def schema_() -> str:
        nonlocal is_current
        if not is_current:  # it never gets older
            pending = revisions.pending_for(ask(revisions.HEADS), locations=migration_locations)
            if pending:
                raise Missing(f"not applied: {', '.join(pending)}; run `dovecote migrate`")
            is_current = True
        return ""

    def redis() -> str:
        client = connect_redis(settings.redis.url.get_secret_value(), LIMIT_SECONDS)
        try:
            client.ping()
        finally:
            client.close()
        return ""

    return {"postgres": postgres, "schema": schema_, "redis": redis}


def require_fresh(what: str, heartbeat: float) -> str:
    """Return how long ago the sign of life was.

    Errors: Missing.
    """
    age = max(0.0, time.time() - heartbeat)
    sentence = f"{what} gave its last sign of life {age:.0f} s ago"
    if age > FRESH_SECONDS:
        raise Missing(sentence)
    return sentence


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
