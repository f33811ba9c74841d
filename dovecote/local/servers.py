"""A real Postgres and a real Redis for a machine that has none.

Both are direct children of this process, on the loopback, behind a random password, and they end
when it ends, even by SIGKILL. What is committed stays: fsync and the append-only file are on
unless the caller says otherwise. One directory belongs to one process at a time (`StateDirectory.lock`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dovecote.local.binaries import NoBinary, Program, ServerError, find_postgres, find_redis
from dovecote.local.child_server import ChildServer, Server, StartFailed, WrongVersion, bare_environment
from dovecote.processes.children import dying_with_us, listens, runs_as
from dovecote.processes.ownership import write_private
from dovecote.processes.state_directory import ensure_private_directory

__all__ = ["NoBinary", "Postgres", "Redis", "Server", "ServerError", "WrongVersion", "servers"]


class Postgres(ChildServer):
    """A Postgres with the role `dovecote` (superuser of its own cluster) and a database of that name."""

    stop_signal = signal.SIGINT  # fast: roll back what is open, write a checkpoint, end
    process_names = ("postgres",)
    # Its pid may be somebody else's by now, and Postgres would refuse to start.
    stale_files = ("postmaster.pid",)

    def _find(self) -> Program:
        return find_postgres(self._environ)

    def _url(self) -> str:
        return f"postgresql://dovecote:{self._password}@127.0.0.1:{self._port}/dovecote"

    def _make_data(self) -> None:
        """Make the cluster and its database in a temporary directory and rename it: all of it is there or nothing."""
        if (self.data / "PG_VERSION").exists():
            self._check_version()
            return
        for abandoned in self.directory.glob("new-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        new = Path(tempfile.mkdtemp(dir=self.directory, prefix="new-"))
        try:
            self._init(new)
            (new / "data").rename(self.data)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _init(self, new: Path) -> None:
        password = new / "password"
        write_private(password, self._password)
        if self._user:
            os.chown(new, self._user.uid, self._user.gid)
            os.chown(password, self._user.uid, self._user.gid)
        initdb = [str(self._program.path.with_name("initdb")), "--pgdata", str(new / "data")]
        initdb += ["--username=dovecote", "--auth=scram-sha-256", f"--pwfile={password}"]
        initdb += ["--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"]
        if self._settings.get("fsync") == "off":
            initdb += ["--no-sync"]
        self._run(initdb)
        # Single-user mode: no port, no password, nobody else, and the rename comes after it.
        single = [str(self._program.path), "--single", "-D", str(new / "data"), "postgres"]
        self._run(single, b"CREATE DATABASE dovecote\n")

    def _run(self, command: list[str], stdin: bytes = b"") -> None:
        done = subprocess.run(
            command,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=bare_environment(),
            preexec_fn=dying_with_us(signal.SIGTERM),
            **runs_as(self._user),
        )
        # Single-user mode ends with 0 whatever the statement did.
        if done.returncode != 0 or b"ERROR:" in done.stdout:
            raise StartFailed(f"{command[0]} failed:\n{done.stdout.decode(errors='replace')[-2000:]}")

    def _check_version(self) -> None:
        made_by = (self.data / "PG_VERSION").read_text(encoding="ascii").strip()
        found = self._version().partition(".")[0]
        if made_by != found:
            raise WrongVersion(
                f"{self.data} was made by PostgreSQL {made_by}, and the one found is {found} "
                f"({self._program.origin}): name a PostgreSQL {made_by} in DOVECOTE_POSTGRES_BIN, "
                f"or move {self.directory} away to begin with empty tables"
            )

    def _version(self) -> str:
        """Return `15.14` from `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)`."""
        command = [str(self._program.path), "--version"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return said.partition(") ")[2].split()[0]

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "128MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_checkpoints": "off",
            # Some containers have no /dev/shm; files are slower and always there.
            "dynamic_shared_memory_type": "posix" if os.access("/dev/shm", os.W_OK) else "mmap",  # noqa: S108
            **self._settings,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self._program.path), "-D", str(self.data), "-p", str(self._port), *options]

    def _answers(self, pid: int) -> str | None:
        """Read what the postmaster says in its lock file, as pg_ctl does: pid first, state eighth."""
        try:
            lines = (self.data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return None
        ready = len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"
        return f"PostgreSQL {self._version()}" if ready else None


class Redis(ChildServer):
    """A Redis or Valkey that keeps an append-only file and never evicts."""

    stop_signal = signal.SIGTERM
    process_names = ("redis-server", "valkey-server")

    def _find(self) -> Program:
        return find_redis(self._environ)

    def _url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def _make_data(self) -> None:
        if not self.data.exists():
            self.data.mkdir(mode=0o700)
            if self._user:
                os.chown(self.data, self._user.uid, self._user.gid)

    def _command(self) -> list[str]:
        return [str(self._program.path), "-", "--dir", str(self.data)]

    def _standard_input(self) -> bytes:
        """The settings; not in the command, because everybody can read that, password and all."""
        settings = {
            "bind": "127.0.0.1",
            "port": str(self._port),
            "requirepass": self._password,
            "daemonize": "no",
            # The command stays readable in /proc: that is how a later start recognises this one.
            "set-proc-title": "no",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            **{name.replace("_", "-"): value for name, value in self._settings.items()},
        }
        return "".join(f'{name} "{value}"\n' for name, value in settings.items()).encode()

    def _answers(self, pid: int) -> str | None:
        # The password is for nobody who was quicker to take the port.
        if not listens(pid, self._port):
            return None
        client = redis.Redis(port=self._port, password=self._password, retry=Retry(NoBackoff(), 0), socket_timeout=1)
        try:
            client.ping()  # refused while the append-only file is being read
            about = client.info("server")
        except redis.RedisError:
            return None
        finally:
            client.close()
        if int(about["process_id"]) != pid:
            return None
        if "valkey_version" in about:
            return f"Valkey {about['valkey_version']}"
        return f"Redis {about['redis_version']}"


@contextmanager
def servers(
    directory: Path,
    *,
    postgres_settings: Mapping[str, str] | None = None,
    redis_settings: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[tuple[Server, Server]]:
    """Run both in `directory`, which is made if it is missing; both are stopped however this ends."""
    ensure_private_directory(directory)
    postgres = Postgres(directory / "postgres", postgres_settings, environ=environ)
    cache = Redis(directory / "redis", redis_settings, environ=environ)
    try:
        yield postgres.start(), cache.start()
    finally:
        # Asked together, awaited together: the checkpoint of one is the waiting time of both.
        for server in (cache, postgres):
            server.ask_to_stop()
        for server in (cache, postgres):
            server.stop()
