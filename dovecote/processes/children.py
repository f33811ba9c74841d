"""How our child processes live: as whom, and never longer than we do.

The only place that calls prctl. Linux only: elsewhere nothing ties a child to its parent.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

_PR_SET_PDEATHSIG = 1
# Looked up now: a child between fork and exec must not import or load anything.
_prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)


def die_with_parent(sig: signal.Signals, parent_pid: int | None = None) -> None:
    """Ask the kernel to send `sig` to this process when its parent ends, however it ends.

    Shape:   for a process that already runs; `parent_pid` is who its parent should be, and if
             that one is gone already, `sig` is sent at once.
    Note:    "parent" means the *thread* that forked us. A change of uid forgets the wish.
    """
    _set_death_signal(sig)
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), sig)


def dying_with_us(sig: signal.Signals) -> Callable[[], None]:
    """Return a `preexec_fn` for Popen: the child gets `sig` when this process ends.

    CPython calls it after setuid, which is where the wish has to be made.
    Errors:  RuntimeError off the main thread, whose end the kernel would take for ours.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "child processes are started from the main thread only: "
            "the kernel ends them together with the thread that started them"
        )
    parent_pid = os.getpid()

    def in_the_child() -> None:
        _set_death_signal(sig)
        if os.getppid() != parent_pid:  # it ended between fork and prctl
            os._exit(1)

    return in_the_child


def _set_death_signal(sig: signal.Signals) -> None:
    if _prctl is not None and _prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def listens(pid: int, port: int) -> bool:
    """Return whether it is `pid` that listens on this port of 127.0.0.1, and not another process.

    Where its descriptors may not be seen (a container without CAP_SYS_PTRACE), it is enough that its user listens.
    """
    wanted = f"0100007F:{port:04X}"
    try:
        owner = Path(f"/proc/{pid}").stat().st_uid
        lines = Path("/proc/self/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    except OSError:  # it has ended
        return False
    for line in lines:
        _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
        if (local, state, int(uid)) == (wanted, "0A", owner):
            try:
                return any(
                    str(descriptor.readlink()) == f"socket:[{inode}]"
                    for descriptor in Path(f"/proc/{pid}/fd").iterdir()
                )
            except PermissionError:
                return True
    return False


class RunsAs(TypedDict, total=False):
    """The arguments of Popen that choose a user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class ServerUser:
    """Whom the servers run as when we are root: Postgres refuses to be root."""

    name: str
    uid: int
    gid: int

    @classmethod
    def chosen(cls) -> ServerUser | None:
        """Return `postgres`, else `nobody`; None when we are not root and stay who we are."""
        if os.geteuid() != 0:
            return None
        for name in ("postgres", "nobody"):
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                continue
            return cls(name, entry.pw_uid, entry.pw_gid)
        return cls("nobody", 65534, 65534)

    @classmethod
    def owning(cls, path: Path) -> ServerUser | None:
        """Return the owner of what an earlier start left, so that it finds its data again."""
        chosen = cls.chosen()
        owner = path.stat() if path.exists() else None
        if chosen is None or owner is None or owner.st_uid in (0, chosen.uid):
            return chosen
        return cls(f"uid {owner.st_uid}", owner.st_uid, owner.st_gid)

    def reaches(self, directory: Path) -> bool:
        """Return whether every directory on the way lets this user through, by its mode bits alone."""
        resolved = directory.resolve()
        return all(self._passes(step) for step in (resolved, *resolved.parents) if step.exists())

    def _passes(self, directory: Path) -> bool:
        status = directory.stat()
        if status.st_uid == self.uid:
            return bool(status.st_mode & 0o100)
        if status.st_gid == self.gid:
            return bool(status.st_mode & 0o010)
        return bool(status.st_mode & 0o001)


def runs_as(user: ServerUser | None) -> RunsAs:
    """Return Popen's arguments for `user`; none when there is nobody to become."""
    if user is None:
        return {}
    return {"user": user.uid, "group": user.gid, "extra_groups": []}


def started_at(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks since boot; None if there is no such process.

    With the pid it names one process for ever; the pid alone is given out again.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # Field 22, counted behind the name, which may itself hold spaces and brackets.
    state, *fields = line.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
