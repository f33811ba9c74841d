"""What tests of running processes have in common."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from workers.children import started_at

T = TypeVar("T")


def eventually(condition: Callable[[], T], within_seconds: float, what: str) -> T:
    """Return the first truthy answer of `condition`; AssertionError naming `what` after the deadline."""
    deadline = time.monotonic() + within_seconds
    while True:
        if answer := condition():
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_seconds:g} s: {what}")
        time.sleep(0.01)


def are_there(pids: Iterable[int]) -> bool:
    """Tell if any of them still runs; a zombie that nobody has reaped yet does not."""
    return any(started_at(pid) is not None for pid in pids)


@contextmanager
def a_place_for_servers() -> Iterator[Path]:
    """A directory for `servers()` that their user can reach when we are root, unlike pytest's tmp_path."""
    place = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="dovecote-test-"))
    place.chmod(0o711)
    try:
        yield place
    finally:
        shutil.rmtree(place)
