"""What tests of running processes have in common."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from dovecote.processes.children import started_at

T = TypeVar("T")

# Where servers keep their data. A database is 400 files, for each of which ext4 takes up to a millisecond: in memory
# one is copied in 15 ms instead of 400. No test cuts the power, and memory outlives a killed server as a disk does.
_MEMORY, _DISK = Path("/dev/shm"), Path("/var/tmp")  # noqa: S108 - each place below has a random name and is its owner's
# The servers of a run have not held a fifth of it yet.
_ENOUGH_MEMORY_BYTES = 4_000_000_000
_MEMORY_OF_THIS_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def eventually(condition: Callable[[], T], within_seconds: float, what: str) -> T:
    """Return the first truthy answer of `condition`; AssertionError naming `what` after the deadline."""
    deadline = time.monotonic() + within_seconds
    while True:
        if answer := condition():
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_seconds:g} s: {what}")
        time.sleep(0.01)  # between two questions: this is how all others await a condition


def are_there(pids: Iterable[int]) -> bool:
    """Return whether any of them still runs; a zombie that nobody has reaped yet does not."""
    return any(started_at(pid) is not None for pid in pids)


def has_enough_memory() -> bool:
    if not os.access(_MEMORY, os.W_OK):
        return False
    available = [shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # no limit is the word "max"
        available.append(int(_MEMORY_OF_THIS_CONTAINER.read_text()))
    return min(available) >= _ENOUGH_MEMORY_BYTES


@contextmanager
def a_place_for_servers() -> Iterator[Path]:
    """A directory for `servers()` that their user can reach when we are root, unlike pytest's tmp_path."""
    # What a killed run has left would hold memory until the machine starts again.
    for left in _MEMORY.glob("dovecote-test-*-*"):
        if not psutil.pid_exists(int(left.name.split("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    disk = _MEMORY if has_enough_memory() else _DISK
    place = Path(tempfile.mkdtemp(dir=disk, prefix=f"dovecote-test-{os.getpid()}-"))
    place.chmod(0o711)
    try:
        yield place
    finally:
        shutil.rmtree(place)
