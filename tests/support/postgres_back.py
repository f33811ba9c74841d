"""A Postgres of a test's own that goes back in time: to a snapshot of its disk, or by a crash that forgets commits."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from dovecote.local.child_server import Server
from dovecote.local.servers import Postgres
from tests.support.clusters import put_cluster


class PostgresThatGoesBack:
    """One server, migrated; every start is at the same address.

    Errors: those of ChildServer; CalledProcessError when a copy fails.
    """

    def __init__(self, place: Path, settings: Mapping[str, str] | None = None) -> None:
        """`place` is a directory that the server's user can reach: tests.support.processes.a_place_for_servers()."""
        put_cluster(place / "postgres")
        self._postgres = Postgres(place / "postgres", {"fsync": "off", **(settings or {})})
        self._snapshots = place / "snapshots"
        self._snapshots.mkdir()
        self.server: Server = self._postgres.start()

    @property
    def url(self) -> str:
        return self.server.url

    def snapshot(self, name: str = "snapshot") -> Path:
        """Copy the disk of the running server, as a storage would: at one point in time, whatever it is doing."""
        snapshot = self._snapshots / name
        with frozen(self.server.pid):
            _copy(self._postgres.data, snapshot)
        return snapshot

    def restore(self, snapshot: Path) -> None:
        """Crash, put the snapshot in place of the disk, and start again."""
        self.crash()
        shutil.rmtree(self._postgres.data)
        _copy(snapshot, self._postgres.data)
        self.start()

    def forget_from_now_on(self) -> None:
        """Until the next crash, a commit that is not waited for reaches the disk only with one that is."""
        with psycopg.connect(self.url) as connection:
            found = connection.execute("select pid from pg_stat_activity where backend_type = 'walwriter'").fetchone()
        assert found is not None
        os.kill(found[0], signal.SIGSTOP)

    def crash(self) -> None:
        """Kill it: commits that were not yet on their way to the disk are forgotten."""
        children = _family(self.server.pid)[1:]
        self._postgres.kill()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # the one that is stopped does not see that its parent is gone

    def start(self) -> None:
        """Start it again at the same address."""
        self.server = self._postgres.start(port=self.server.port)

    def stop(self) -> None:
        self._postgres.stop()


@contextmanager
def postgres_that_goes_back(place: Path, settings: Mapping[str, str] | None = None) -> Iterator[PostgresThatGoesBack]:
    """Run one until the end of the block."""
    postgres = PostgresThatGoesBack(place, settings)
    try:
        yield postgres
    finally:
        postgres.stop()


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Stop a server and all of its processes while the block runs: nothing of it reaches the disk."""
    pids = _family(pid)
    for one in pids:
        os.kill(one, signal.SIGSTOP)
    try:
        yield
    finally:
        for one in reversed(pids):
            os.kill(one, signal.SIGCONT)


def _family(pid: int) -> list[int]:
    """Return the process and its descendants, parents first."""
    children = [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]
    return [pid, *(one for child in children for one in _family(child))]


def _copy(source: Path, target: Path) -> None:
    # `cp`, because copytree() changes the owner, and for root the server runs as another user.
    subprocess.run(["/bin/cp", "-a", "--no-target-directory", str(source), str(target)], check=True)
