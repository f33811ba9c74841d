"""`dovecote demo` of this application: write events of the three slices and wait for their effects."""

from __future__ import annotations

from dovecote.cli.demo import Events, Timeout, run_demo
from dovecote.cli.output import AsJson


def demo(events: Events = 1_000, timeout_seconds: Timeout = 300.0, as_json: AsJson = False) -> None:
    """Write mixed events of the three slices and wait until every one is an effect, once.

    Uses the running system, or runs one of its own meanwhile. Exit code 1 if an event is lost or handled twice.

    Example: dovecote demo --events 10000
    """
    from workers.demo import run

    run_demo(run, events, timeout_seconds, as_json)
