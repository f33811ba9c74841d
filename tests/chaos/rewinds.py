"""Faults after which Postgres has forgotten what it had answered: it went back in time.

Each notes on the stage from when on commits may be forgotten, and when Postgres went back: the checker asks for it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.chaos.clocks import real_time
from tests.chaos.history import Rewind
from tests.chaos.schedule import Fault
from tests.chaos.stage import Stage

# Less would be nothing to forget, when the fault took long to begin.
_SHORTEST_LOSS_SECONDS = 1.0


@contextmanager
def failed_over(stage: Stage, _fault: Fault) -> Iterator[None]:
    """An asynchronous standby falls behind, the primary's machine is lost, and the standby takes its place."""
    databases = stage.databases
    databases.await_answer()
    databases.add_standby()
    remembered_until = real_time()
    databases.await_standby()
    databases.stop_streaming()
    stopped = time.monotonic()
    yield
    _wait_since(stopped)
    databases.kill()
    stage.rewinds.append(Rewind(remembered_until, real_time()))
    stage.promote_standby()


@contextmanager
def snapshot_restored(stage: Stage, _fault: Fault) -> Iterator[None]:
    """An operator puts back what the disk held some seconds ago."""
    databases = stage.databases
    databases.await_answer()
    remembered_until = real_time()
    snapshot = stage.directory / "servers" / "snapshot"
    databases.copy_to(snapshot)
    taken = time.monotonic()
    yield
    _wait_since(taken)
    databases.kill()
    stage.rewinds.append(Rewind(remembered_until, real_time()))
    databases.put_back(snapshot)
    stage.start_postgres()


_ASYNCHRONOUS = {
    "synchronous_commit": "off",
    # Otherwise Postgres writes everything down after 0.2 s, or after 1 MB.
    "wal_writer_delay": "10s",
    "wal_writer_flush_after": "1GB",
}


@contextmanager
def crashed_asynchronously(stage: Stage, _fault: Fault) -> Iterator[None]:
    """Commits are answered before they are written down, and then the machine is lost."""
    stage.databases.await_answer()
    remembered_until = real_time()
    with stage.connection() as connection:
        for name, value in _ASYNCHRONOUS.items():
            connection.execute(f"alter system set {name} = '{value}'".encode())
        connection.execute("select pg_reload_conf()")
    began = time.monotonic()
    yield
    _wait_since(began)
    with stage.connection() as connection:
        # For the server that starts next: this one goes on as it is, for it does not reload.
        for name in _ASYNCHRONOUS:
            connection.execute(f"alter system reset {name}".encode())
    stage.databases.kill()
    stage.rewinds.append(Rewind(remembered_until, real_time()))
    stage.start_postgres()


def _wait_since(began: float) -> None:
    """Give the writers a span of time in which they commit what will be forgotten."""
    time.sleep(max(0.0, began + _SHORTEST_LOSS_SECONDS - time.monotonic()))  # the span is the fault: nothing to await
