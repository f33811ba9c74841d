"""Find out what is wrong with a system, by trying it: one finding a check, each with what to do about it.

Every check has its own time limit and its own connection, so that a server that is down or silent is a finding,
and the doctor never hangs.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dovecote.operations.doctor import flow, postgres, redis
from dovecote.operations.doctor.finding import Examination, Finding, Subject, error
from dovecote.processes.threads import begin
from dovecote.route import Route
from dovecote.settings import Settings

__all__ = ["Examination", "Finding", "examine"]

_MAX_SECONDS = 15.0


def examine(
    settings: Settings,
    routes: Sequence[Route],
    *,
    migration_locations: Sequence[Path] = (),
    now: Callable[[], float] = time.time,
    limit_seconds: float = _MAX_SECONDS,
) -> Examination:
    """Return what was found, all checks side by side. `now` is this machine's clock, in Unix seconds."""
    subject = Subject(settings, routes, now, migration_locations)
    groups: dict[str, Callable[[Subject], list[Finding]]] = {
        "postgres": postgres.findings,
        "redis": redis.findings,
        "queues": flow.findings,
    }
    answers = [(name, begin(partial(group, subject), "doctor")) for name, group in groups.items()]
    until = time.monotonic() + limit_seconds
    found: list[Finding] = []
    for name, answer in answers:
        try:
            found += answer.result(max(0.01, until - time.monotonic()))
        except TimeoutError:
            if answer.done():  # a check's own
                raise
            silent = error(
                f"{name}.answers",
                f"no answer within {limit_seconds:g} s",
                "The server takes connections and is silent: look at the machine, the network and a proxy in between.",
            )
            found.append(silent)
    return Examination(found)
