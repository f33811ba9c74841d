"""The stage's Postgres, copies of it, and a standby that follows it: what "Postgres goes back" is made of.

A copy is what a snapshot of the disk would hold: every process of the server stands still while its files are
copied. A standby is such a copy that streams from the primary since, and takes its place when it is promoted.
"""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
from psycopg.rows import TupleRow

from dovecote.local.servers import Postgres, Server
from dovecote.processes.state_directory import ensure_private_directory
from tests.support.processes import are_there, eventually

# Checkpoints come often enough that a copy stays small, and a new standby finds what it did not get yet.
_SETTINGS = {"max_wal_size": "64MB", "min_wal_size": "32MB", "wal_keep_size": "32MB"}
# On a machine that is busy with everything else, and right after another fault.
_WITHIN_SECONDS = 60


class Databases:
    """One primary, and at times its standby. Used from the main thread only: it starts servers."""

    def __init__(self, directory: Path, settings: Mapping[str, str] | None = None) -> None:
        self._settings = {**_SETTINGS, **(settings or {})}
        self.primary = Postgres(directory / "postgres", self._settings)
        self._directory = directory
        self._server: Server | None = None
        self._standby: Postgres | None = None
        self._standby_server: Server | None = None
        self._standbys = 0
        self._sender: psutil.Process | None = None

    def start(self) -> str:
        """Start the primary on the data it has; return its URL."""
        self._server = self.primary.start()
        return self._server.url

    def stop(self) -> None:
        """End all there is."""
        self.resume_streaming()
        if self._standby is not None:
            self._standby.stop()
        self.primary.stop()

    def kill(self) -> None:
        """SIGKILL for each process of the primary, as if its machine were gone; return when there is none."""
        processes = self._processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._sender = None
        self.primary.kill()
        eventually(lambda: not are_there(one.pid for one in processes), _WITHIN_SECONDS, "a Postgres that is gone")

    def await_answer(self) -> None:
        """Return when the primary takes work; the fault before this one may have left it recovering."""
        eventually(lambda: _answers(self._url), _WITHIN_SECONDS, "a Postgres that answers")

    # Copies ------------------------------------------------------------------------------------

    def copy_to(self, directory: Path) -> None:
        """Copy the data of the running primary, whose processes stand still meanwhile."""
        with self._standing_still():
            _copy(self.primary.data, directory)

    def put_back(self, directory: Path) -> None:
        """Let the copy be the data of the primary, which must not run."""
        shutil.rmtree(self.primary.data)
        directory.rename(self.primary.data)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        stopped = self._processes()[:1]
        try:
            stopped[0].suspend()  # the postmaster first: nobody else makes processes
            stopped += self._processes()[1:]
            for process in stopped[1:]:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            yield
        finally:
            for process in reversed(stopped):
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def _processes(self) -> list[psutil.Process]:
        assert self._server is not None
        postmaster = psutil.Process(self._server.pid)
        return [postmaster, *postmaster.children(recursive=True)]

    # The standby -------------------------------------------------------------------------------

    def add_standby(self) -> None:
        """Start a standby of the primary."""
        self._standbys += 1
        directory = self._directory / f"standby-{self._standbys}"
        ensure_private_directory(directory)
        shutil.copy2(self.primary.directory / "password", directory / "password")
        self.copy_to(directory / "data")
        # Appended to, and not made anew: the file belongs to the servers' own user.
        with (directory / "data" / "postgresql.auto.conf").open("a") as file:
            file.write(f"primary_conninfo = '{self._url}'\n")
        _copy(directory / "data" / "PG_VERSION", directory / "data" / "standby.signal")  # the name is all that counts
        self._standby = Postgres(directory, self._settings)
        self._standby_server = self._standby.start()

    def await_standby(self) -> None:
        """Return when the standby streams and has everything that was committed before the call."""
        with self._connection() as connection:
            flushed = connection.execute("select pg_current_wal_flush_lsn()").fetchone()
            assert flushed is not None
            eventually(lambda: self._has(connection, str(flushed[0])), _WITHIN_SECONDS, "a standby that streams")

    def _has(self, connection: psycopg.Connection[TupleRow], position: str) -> bool:
        found = connection.execute(
            "select true from pg_stat_replication where state = 'streaming' and flush_lsn >= %s::pg_lsn", (position,)
        )
        return found.fetchone() is not None

    def stop_streaming(self) -> None:
        """Let the standby hear nothing more: the process that sends to it stands still."""
        with self._connection() as connection:
            found = connection.execute("select pid from pg_stat_replication").fetchone()
        assert found is not None
        self._sender = psutil.Process(found[0])
        self._sender.suspend()

    def resume_streaming(self) -> None:
        if self._sender is not None:
            with suppress(psutil.NoSuchProcess):
                self._sender.resume()
            self._sender = None

    def promote_standby(self) -> str:
        """Let the standby be the primary, once that was killed; return its URL. The old data is removed."""
        assert self._standby is not None
        assert self._standby_server is not None
        with psycopg.connect(self._standby_server.url, autocommit=True) as connection:
            connection.execute("select pg_promote()")
        shutil.rmtree(self.primary.directory)
        self.primary, self._standby = self._standby, None
        self._server, self._standby_server = self._standby_server, None
        return self._url

    @property
    def _url(self) -> str:
        assert self._server is not None
        return self._server.url

    def _connection(self) -> psycopg.Connection[TupleRow]:
        return psycopg.connect(self._url, autocommit=True, connect_timeout=5)


def _answers(url: str) -> bool:
    with suppress(psycopg.Error), psycopg.connect(url, connect_timeout=5):
        return True
    return False


def _copy(source: Path, target: Path) -> None:
    # Unlike shutil's, this copy keeps the owner, who is the servers' own user.
    subprocess.run(["/bin/cp", "-a", "--reflink=auto", str(source), str(target)], check=True)
