"""A clock that the harness can put wrong, for all processes of one role, while they run.

It shifts what Python reads as the time of day: the ids a writer makes, the heartbeats a worker sends to
Redis, the time by which the relay takes a worker for dead. Monotonic clocks, and those of Postgres and
Redis, stay right; a server whose clock is wrong is the same as all its clients being wrong the other way.
"""

import threading
import time
from datetime import timedelta
from pathlib import Path

import time_machine

_POLL_INTERVAL_SECONDS = 0.1
# Taken while the clock is right; nobody shifts the monotonic one.
_BEGAN = time.time() - time.monotonic()


def put_wrong(directory: Path, role: str, seconds: float) -> None:
    """Let the clocks of the role be so many seconds ahead; 0 puts them right."""
    file = directory / f"skew-{role}"
    temporary = file.with_suffix(".new")
    temporary.write_text(str(seconds))
    temporary.replace(file)


def follow(directory: Path, role: str) -> None:
    """Keep this process's clock as wrong as the harness wants it."""
    threading.Thread(target=_follow, args=(directory / f"skew-{role}",), name="clock", daemon=True).start()


def real_time() -> float:
    """Return the true time of day, in Unix seconds."""
    return _BEGAN + time.monotonic()


def _follow(file: Path) -> None:
    ahead, traveller = 0.0, None
    pause = threading.Event()
    while True:
        wanted = float(file.read_text()) if file.exists() else 0.0
        if wanted != ahead:
            if traveller is not None:
                traveller.stop()
                traveller = None
            if wanted:
                traveller = time_machine.travel(timedelta(seconds=wanted), tick=True)
                traveller.start()
            ahead = wanted
        pause.wait(_POLL_INTERVAL_SECONDS)
