"""Find out what is wrong with a system, by trying: one finding a check, each with what to do about it.

Every check has its own time limit and its own connection, so that a server that is down or silent is a finding and
never a doctor that hangs.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from dovecote.operations.doctor import flow, postgres, redis
from dovecote.operations.doctor.finding import Examination, Finding, Subject, error
from dovecote.route import Route
from dovecote.settings import Settings

__all__ = ["Examination", "Finding", "examine"]

_MAX_SECONDS = 15.0

Answer = TypeVar("Answer")


def examine(
    settings: Settings,
    routes: Sequence[Route],
    *,
    now: Callable[[], float] = time.time,
    limit_seconds: float = _MAX_SECONDS,
) -> Examination:
    """Return what was found, all checks side by side. `now` is this machine's clock, in Unix seconds."""
    subject = Subject(settings, routes, now)
    groups: dict[str, Callable[[Subject], list[Finding]]] = {
        "postgres": postgres.findings,
        "redis": redis.findings,
        "queues": flow.findings,
    }
    answers = [(name, _begin(group, subject)) for name, group in groups.items()]
    until = time.monotonic() + limit_seconds
    found: list[Finding] = []
    for name, answer in answers:
        try:
            outcome = answer.get(timeout=max(0.01, until - time.monotonic()))
        except queue.Empty:
            silent = error(
                f"{name}.answers",
                f"no answer within {limit_seconds:g} s",
                "The server takes connections and is silent: look at the machine, the network and a proxy in between.",
            )
            found.append(silent)
            continue
        if isinstance(outcome, BaseException):
            raise outcome
        found += outcome
    return Examination(found)


def _begin(
    group: Callable[[Subject], list[Finding]], subject: Subject
) -> "queue.SimpleQueue[list[Finding] | BaseException]":
    """Start a group of checks in a thread that holds up nobody's end."""
    answer: queue.SimpleQueue[list[Finding] | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(group(subject))
        except BaseException as caught:  # raised where the answer is taken
            answer.put(caught)

    threading.Thread(target=work, daemon=True, name="doctor").start()
    return answer
