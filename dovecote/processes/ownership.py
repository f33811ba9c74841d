"""Files of our own: read where nobody else may write, written where nobody else may read.

What decides about code or settings has to be ours alone.
"""

import grp
import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from dovecote.errors import DovecoteError

_MAX_BYTES = 1_000_000


class NotOurs(DovecoteError):
    """Somebody else made it or may write to it; the message says who, beginning with the path."""


def read_ours(path: Path) -> str | None:
    """Return the text of a file that nobody but us and root may write, None if there is none.

    What was judged is what is read: it is opened once.
    Errors: NotOurs; OSError; UnicodeDecodeError.
    """
    try:
        _require_directory(path.parent)
        # A pipe must not hold up the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as file:
        if path.is_symlink():
            require_ours(path, path.lstat())
            _require_directory(path.resolve().parent)
        require_ours(path, os.fstat(descriptor))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotOurs(f"{path} is no regular file")
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise NotOurs(f"{path} is larger than {_MAX_BYTES} bytes")
    return content.decode()


def write_private(path: Path, content: str, *, replace: bool = True) -> None:
    """Write a file that only we can read, whole or not at all. Without `replace` one that is there stays."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            Path(temporary).replace(path)
        else:
            # Unlike a rename, a link never overwrites: of two first starts one's secrets win.
            with suppress(FileExistsError):
                path.hardlink_to(temporary)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _require_directory(directory: Path) -> None:
    require_ours(directory, directory.stat())


def require_ours(path: Path, status: os.stat_result) -> None:
    """Refuse what others than root and we own or may write.

    Errors: NotOurs.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise NotOurs(f"{path} belongs to {_name(status.st_uid)}")
    if stat.S_ISLNK(status.st_mode):
        return
    if status.st_mode & stat.S_IWOTH:
        raise NotOurs(f"everybody may write to {path}")
    if status.st_mode & stat.S_IWGRP and not _is_private(path, status.st_gid):
        raise NotOurs(f"a group may write to {path}")


def require_ours_up_to_root(directory: Path) -> None:
    """Refuse a directory that others may move away, and put another in its place. A sticky bit prevents that.

    Errors: NotOurs.
    """
    for above in directory.absolute().parents:
        if above.is_symlink():
            require_ours(above, above.lstat())
    for above in directory.resolve().parents:
        status = above.stat()
        if status.st_uid == 0 and status.st_mode & stat.S_ISVTX:
            continue
        require_ours(above, status)


def _is_private(path: Path, gid: int) -> bool:
    """Return whether nobody but root and us is in the group: many systems give each user one, and a umask of 002."""
    with suppress(OSError):  # no such attributes on this file system
        if "system.posix_acl_access" in os.listxattr(path):
            return False  # then the mode says nothing of who
    ours = {0, os.geteuid()}
    try:
        members = {pwd.getpwnam(name).pw_uid for name in grp.getgrgid(gid).gr_mem}
    except KeyError:
        return False
    return members | {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == gid} <= ours


def _name(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user {uid}"
