"""Where a local system lives, and who is running in it.

`dovecote up` announces itself here; every other command finds it through `StateDirectory.running()`.
Files that hold secrets are 0600; nothing here changes the mode of a directory it did not make.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dovecote.errors import DovecoteError
from dovecote.processes.children import ServerUser, started_at
from dovecote.processes.ownership import NotOurs, read_ours, require_ours, require_ours_up_to_root, write_private

# For root, whose own home is closed to the user the servers run as. Not /tmp: it may be memory.
VAR_TMP = Path("/var/tmp")  # noqa: S108 - names below it are ours or refused, see ensure_private_directory()


class StateDirectoryError(DovecoteError):
    """This directory cannot be a home; the message says why and what to do."""


class StateDirectoryBusy(StateDirectoryError):
    """Another system runs in this home."""

    def __init__(self, path: Path, pid: int | None) -> None:
        who = f"process {pid}" if pid else "another process"
        super().__init__(f"{who} already runs in {path}: stop it, or set DOVECOTE_HOME to another directory")
        self.pid = pid


@dataclass(frozen=True)
class RunningSystem:
    """What a running system says about itself. `environment` holds secrets."""

    pid: int
    started: int
    environment: dict[str, str]

    def is_alive(self) -> bool:
        return started_at(self.pid) == self.started


@dataclass(frozen=True)
class StateDirectory:
    """One directory, one system at a time."""

    path: Path

    @classmethod
    def locate(cls, environ: Mapping[str, str]) -> StateDirectory:
        """Return the home that `environ` asks for, without making it."""
        if chosen := environ.get("DOVECOTE_HOME"):
            return cls(Path(chosen).expanduser().absolute())
        if os.geteuid() == 0:
            return cls(VAR_TMP / "dovecote-root")
        state = environ.get("XDG_STATE_HOME") or "~/.local/state"
        return cls(Path(state).expanduser().absolute() / "dovecote")

    def create(self) -> None:
        """Make the directory if it is missing; StateDirectoryError if it is somebody else's."""
        ensure_private_directory(self.path)

    def servers_path(self) -> Path:
        """Return where server data goes, made and reachable by the user the servers run as.

        As root in a closed place (0700 from mktemp, or below /root) that is a directory in
        /var/tmp, and `servers` is a symlink to it: a second start finds its data.
        """
        place = self.path / "servers"
        if place.is_symlink():
            elsewhere = place.readlink()
            ensure_private_directory(elsewhere)
            return elsewhere
        user = ServerUser.chosen()
        if user is None or user.reaches(place):
            ensure_private_directory(place)
            return place
        return self._servers_elsewhere(place, user)

    def _servers_elsewhere(self, place: Path, user: ServerUser) -> Path:
        digest = hashlib.sha256(os.fsencode(self.path.resolve())).hexdigest()
        elsewhere = VAR_TMP / f"dovecote-{digest[:12]}"
        try:
            place.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:  # there is data in it, from when the way was still open
            raise StateDirectoryError(
                f"the user {user.name}, as whom the servers run, cannot reach {place}: "
                f"open the directories above it (chmod o+x), or choose another DOVECOTE_HOME"
            ) from error
        ensure_private_directory(elsewhere)
        place.symlink_to(elsewhere)
        return elsewhere

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process; the kernel releases it at our end. StateDirectoryBusy if it is held."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                said = os.pread(descriptor, 32, 0).strip()
                raise StateDirectoryBusy(self.path, int(said) if said.isdigit() else None) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def announce(self, environment: Mapping[str, str]) -> None:
        """Announce to other commands that this process runs here, and with which environment."""
        pid = os.getpid()
        system = RunningSystem(pid, started_at(pid) or 0, dict(environment))
        write_private(self.path / "system.json", json.dumps(asdict(system), indent=2))

    def withdraw(self) -> None:
        (self.path / "system.json").unlink(missing_ok=True)

    def running(self) -> RunningSystem | None:
        """Return the system that runs here; None if there is none, or it died without a word."""
        said = self._read("system.json")
        if said is None:
            return None
        try:
            system = RunningSystem(**said)
        except TypeError:  # another version's file
            return None
        return system if system.is_alive() else None

    def secrets(self) -> dict[str, str]:
        """Return this home's own secrets, as environment; made at the first call and kept."""
        if not (self.path / "secrets.json").exists():
            write_private(self.path / "secrets.json", json.dumps(_new_secrets(), indent=2), replace=False)
        return self._read("secrets.json") or {}

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return what the file says. It names servers, keys and passwords: who may write it decides about us."""
        try:
            content = read_ours(self.path / name)
        except PermissionError as error:
            raise StateDirectoryError(f"{self.path / name} belongs to another user: run this as that user") from error
        except NotOurs as error:
            raise StateDirectoryError(
                f"{self.path / name} is not read, because {error}: run this as the user whose it is, "
                "or set DOVECOTE_HOME to a directory that is yours alone"
            ) from None
        if content is None:
            return None
        try:
            said = json.loads(content)
        except ValueError as error:
            raise StateDirectoryError(f"{self.path / name} is not JSON: move it away ({error})") from error
        return said if isinstance(said, dict) else None


def ensure_private_directory(directory: Path) -> None:
    """Make a directory of our own, or refuse one that somebody else made or may write to.

    For root it is 0711: the user the servers run as passes through it, and reads nothing.
    """
    try:
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700)
            if os.geteuid() == 0:
                directory.chmod(0o711)
    except FileExistsError:
        pass  # another start was faster, or it is a dangling symlink: judged below
    except OSError as error:
        raise StateDirectoryError(f"cannot make {directory}: {error.strerror}") from error
    _require_private_directory(directory)


def _require_private_directory(directory: Path) -> None:
    try:
        link, status = directory.lstat(), directory.stat()
        if not directory.is_dir():
            raise StateDirectoryError(f"{directory} is not a directory")
        if {link.st_uid, status.st_uid} != {os.geteuid()}:
            raise StateDirectoryError(
                f"{directory} belongs to another user: set DOVECOTE_HOME to a directory of your own"
            )
        require_ours(directory, status)
        require_ours_up_to_root(directory)
    except NotOurs as error:
        raise StateDirectoryError(
            f"{error}: set DOVECOTE_HOME to a directory of your own in a place of your own"
        ) from None
    except OSError as error:
        raise StateDirectoryError(f"cannot use {directory}: {error.strerror}") from error


def _new_secrets() -> dict[str, str]:
    def key() -> str:
        return base64.b64encode(secrets.token_bytes(32)).decode()

    return {
        "DOVECOTE_PRIVACY__HASH_KEY": key(),
        "DOVECOTE_PRIVACY__ENCRYPTION_KEYS": f"k1:{key()}",
        "DOVECOTE_PRIVACY__CODE_KEY": key(),
    }
