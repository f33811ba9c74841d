"""One server as a child of this process: how it is found, started, awaited and ended.

What Postgres and Redis share; what is special to each is in `dovecote/local/servers.py`. It listens on the
loopback behind a random password and ends when this process ends, even by SIGKILL.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dovecote.local.binaries import Program, ServerError
from dovecote.processes.children import ServerUser, dying_with_us, runs_as
from dovecote.processes.ownership import write_private
from dovecote.processes.state_directory import ensure_private_directory

# Crash recovery of a large log takes its time; an idle start takes a tenth of a second.
_READY_WITHIN_SECONDS = 60.0
# How long a server of a killed parent may take to put its things in order.
_GONE_WITHIN_SECONDS = 20.0
_POLL_INTERVAL_SECONDS = 0.01
_PORTS_TRIED = 5
_LOG_BYTES_KEPT = 10_000_000


class StartFailed(ServerError):
    """The server ended, or did not answer, instead of starting."""


class WrongVersion(ServerError):
    """The data was written by another major version."""


class StillRunning(ServerError):
    """A server of an earlier process does not release the data."""


class _PortTaken(Exception):
    pass


@dataclass(frozen=True)
class Server:
    """A running server. `url` holds its password."""

    name: str
    origin: str
    url: str
    address: str
    data: Path
    pid: int

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


class ChildServer(ABC):
    """What the two servers share: a directory, a password, a port, a life and a log.

    Shape:   `directory` holds `data` (the server's own), and `password`, `port` and `log` (ours).
    """

    stop_signal: signal.Signals
    process_names: tuple[str, ...]
    stale_files: tuple[str, ...] = ()

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, str] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self._settings = dict(settings or {})
        self._environ = os.environ if environ is None else environ
        self._process: subprocess.Popen[bytes] | None = None
        self._user: ServerUser | None = None
        self._password = ""
        self._port = 0
        self._program: Program

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, port: int | None = None) -> Server:
        """Start, and return when it answers. Without `port`: the last one if it is free.

        Errors:  ServerError with the end of the log; RuntimeError off the main thread.
        """
        if self.running:
            raise ServerError(f"the server in {self.directory} runs already")
        self._user = ServerUser.owning(self.data)
        self._program = self._find().reachable_by(self._user)
        self._make_directory()
        self._password = self._kept_password()
        self._make_data()
        _await_silence_in(self.data, self.process_names)
        for name in self.stale_files:
            (self.data / name).unlink(missing_ok=True)
        return self._start_on_one_of([port] if port else self._ports())

    def stop(self, sig: signal.Signals | None = None) -> None:
        """End it in order and wait; one that does not end within 20 s is killed."""
        self.ask_to_stop(sig)
        self._await_end()

    def ask_to_stop(self, sig: signal.Signals | None = None) -> None:
        if self._process is not None:
            self._process.send_signal(sig or self.stop_signal)

    def kill(self) -> None:
        """SIGKILL: a crash, for those who want to see what survives one."""
        self.stop(signal.SIGKILL)

    @abstractmethod
    def _find(self) -> Program: ...

    @abstractmethod
    def _make_data(self) -> None: ...

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _answers(self, pid: int) -> str | None:
        """Return name and version once `pid`, and no stranger on its port, takes work."""

    @abstractmethod
    def _url(self) -> str: ...

    def _standard_input(self) -> bytes:
        return b""

    def _make_directory(self) -> None:
        ensure_private_directory(self.directory)
        if self._user and not self._user.reaches(self.directory):
            raise ServerError(
                f"the user {self._user.name}, as whom servers run for root, cannot reach {self.directory}: "
                "use StateDirectory.servers_path(), or a directory below /var/tmp"
            )

    def _kept_password(self) -> str:
        file = self.directory / "password"
        if not file.exists():
            if self.data.exists():
                raise ServerError(f"{file} is missing, and the data beside it is locked with it: restore it")
            write_private(file, secrets.token_urlsafe(24))
        return file.read_text(encoding="utf-8")

    def _ports(self) -> Iterator[int]:
        """Try the last port first, so that URLs that somebody noted down stay true."""
        with suppress(OSError, ValueError):
            yield int((self.directory / "port").read_text(encoding="utf-8"))
        for _ in range(_PORTS_TRIED):
            yield _free_port()

    def _start_on_one_of(self, ports: Iterable[int]) -> Server:
        for self._port in ports:
            with suppress(_PortTaken):
                return self._start_here()
        raise StartFailed(f"port {self._port} on 127.0.0.1 is taken by another program; see {self.log}")

    def _start_here(self) -> Server:
        if not _is_free(self._port):
            raise _PortTaken
        logged = self._rotated_log_size()
        try:
            process = self._process = self._spawn()
            name = self._await_answer(process.pid, logged)
        except BaseException:
            self.kill()
            raise
        write_private(self.directory / "port", str(self._port))
        address = f"127.0.0.1:{self._port}"
        return Server(name, self._program.origin, self._url(), address, self.data, process.pid)

    def _spawn(self) -> subprocess.Popen[bytes]:
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=descriptor,
                stderr=descriptor,
                cwd="/",
                env=bare_environment(),
                start_new_session=True,  # Ctrl-C is for us; we then stop it in order
                preexec_fn=dying_with_us(self.stop_signal),
                **runs_as(self._user),
            )
        finally:
            os.close(descriptor)
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(self._standard_input())
        return process

    def _await_answer(self, pid: int, logged: int) -> str:
        deadline = time.monotonic() + _READY_WITHIN_SECONDS
        while time.monotonic() < deadline:
            if not self.running:
                self._explain_end(logged)
            if name := self._answers(pid):
                return name
            time.sleep(_POLL_INTERVAL_SECONDS)  # a server that starts notifies nobody
        raise StartFailed(f"no answer within {_READY_WITHIN_SECONDS:.0f} s\n{self._log_since(logged)}")

    def _explain_end(self, logged: int) -> None:
        said = self._log_since(logged)
        if "ddress already in use" in said:
            raise _PortTaken
        raise StartFailed(f"the server in {self.directory} did not start:\n{said}")

    def _log_since(self, size: int) -> str:
        with self.log.open("rb") as file:
            file.seek(size)
            return file.read().decode(errors="replace")[-2000:]

    def _rotated_log_size(self) -> int:
        size = self.log.stat().st_size if self.log.exists() else 0
        if size < _LOG_BYTES_KEPT:
            return size
        self.log.replace(self.directory / "log.1")
        return 0

    def _await_end(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(_GONE_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def bare_environment() -> dict[str, str]:
    """Ours holds secrets that are no business of a server, which may run as another user."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "LANG": "C.UTF-8", "TZ": "UTC"}


def _await_silence_in(data: Path, process_names: tuple[str, ...]) -> None:
    """Wait until no server works in `data`; one whose parent was killed is just shutting down."""
    deadline = time.monotonic() + _GONE_WITHIN_SECONDS
    while pids := _servers_in(data, process_names):
        if time.monotonic() > deadline:
            raise StillRunning(f"process {pids[0]} ({process_names[0]}) still works in {data}: end it (kill {pids[0]})")
        time.sleep(_POLL_INTERVAL_SECONDS)  # they are not our children: nothing notifies of their end


def _servers_in(data: Path, process_names: tuple[str, ...]) -> list[int]:
    """Find them by their working directory: a pid file outlives its process, this does not.

    Postgres and its workers, and Redis, all change into their data directory.
    """
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if _works_in(pid, data, process_names)]


def _works_in(pid: int, data: Path, process_names: tuple[str, ...]) -> bool:
    place = Path(f"/proc/{pid}")
    try:
        if (place / "comm").read_text(encoding="utf-8", errors="replace").strip() not in process_names:
            return False
        return (place / "cwd").readlink() == data.resolve()
    except PermissionError:
        # Root in a container without CAP_SYS_PTRACE may not look, but the command is open.
        return os.fsencode(data) in (place / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
