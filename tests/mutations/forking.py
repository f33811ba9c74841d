"""Run pytest in forks of a process that has the libraries imported, but nothing of ours: half the time of a short test.

Requests come one a line on stdin and are answered one a line on stdout. End of input ends this process and the
fork it waits for. It is started in the tree whose tests it runs.
"""

import importlib
import json
import os
import random
import select
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

_LIBRARIES = (
    "alembic.command",
    "cryptography.hazmat.primitives.ciphers.aead",
    "dramatiq.brokers.redis",
    "hypothesis",
    "prometheus_client",
    "psycopg",
    "pydantic_settings",
    "redis.asyncio",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.orm",
    "structlog",
    "typer.testing",
)


def main() -> None:
    for library in _LIBRARIES:
        importlib.import_module(library)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        ended = _wait(child, request["max_seconds"])
        answers.write(json.dumps({"ended": ended}) + "\n")
        answers.flush()


def _run(request: dict[str, Any]) -> None:
    """Run what is asked for in a process group of its own; does not return."""
    status = 70
    try:
        os.setpgid(0, 0)
        with Path(request["output"]).open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["environment"])
        sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in request["environment"]
        random.seed()
        seen = _Seen()
        status = int(pytest.main(request["words"], plugins=[seen]))
        Path(request["report"]).write_text(json.dumps({"status": status, **vars(seen)}), encoding="utf-8")
    finally:
        sys.stdout.flush()
        os._exit(status)  # atexit handlers and threads of a test's are not ours to wait for


def _wait(child: int, max_seconds: float) -> bool:
    """Return whether it ended by itself in time."""
    ended = os.pidfd_open(child)
    readable, _, _ = select.select([ended, 0], [], [], max_seconds)
    os.close(ended)
    if ended not in readable:
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ended in readable


class _Seen:
    """What failed, what could not even be tried, and how long each test took with what it set up."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.passed: list[str] = []
        self.untried: list[str] = []
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.passed and report.when == "call":
            self.passed.append(report.nodeid)
        if report.failed:
            came_to_an_end = "Timeout (>" not in str(report.longrepr)
            (self.untried if report.when == "setup" and came_to_an_end else self.failed).append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.untried.append(report.nodeid)


if __name__ == "__main__":
    main()
