"""Where variables come from: the environment, a `.env` file that is ours, and files that hold a secret.

From the strongest to the weakest source: the environment, `.env`, the running system of DOVECOTE_HOME. In each,
NAME_FILE may stand for NAME: the path of a file that holds the value, such as /run/secrets/database_url.
"""

import io
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values

from dovecote.errors import DovecoteError
from dovecote.processes.ownership import NotOurs, read_ours

PREFIX = "DOVECOTE_"
ALIASES = {"DATABASE_URL": "DOVECOTE_DATABASE__URL", "REDIS_URL": "DOVECOTE_REDIS__URL"}
_FILE = "_FILE"
_MAX_SECRET_BYTES = 65_536


class SettingsError(DovecoteError):
    """A value is wrong or missing; the message is one sentence for the person who starts the process."""

    exit_code = 2


@dataclass(frozen=True)
class _Given:
    """One option of one source; `name` is how it was spelt."""

    name: str
    value: str

    @property
    def is_file(self) -> bool:
        return self.name.endswith(_FILE) and is_option(self.name)


def chosen(sources: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return our variables under their long names; a later source wins. Only files that count are read.

    Errors: SettingsError for a value and a file in one source, and for a file that cannot be read.
    """
    merged: dict[str, _Given] = {}
    for source in sources:
        merged |= _given_by(source)
    return {long: _content(given) if given.is_file else given.value for long, given in merged.items()}


def without_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without our options, for a process that gets all of them anew."""
    return {name: value for name, value in environ.items() if not is_option(name)}


def is_option(name: str) -> bool:
    """Return whether the name is one of an option, and not of what only says how we start, such as DOVECOTE_HOME."""
    return name.removesuffix(_FILE) in ALIASES or (name.startswith(PREFIX) and "__" in name)


def long_name(name: str) -> str:
    """Return the long name of the option that is meant; what is none of an option stays as it is."""
    option = name.removesuffix(_FILE) if is_option(name) else name
    return ALIASES.get(option, option)


def dotenv(path: Path) -> dict[str, str]:
    """Return what a `.env` says, nothing if there is none.

    Errors: SettingsError where others may write it: who does decides which servers we trust.
    """
    try:
        text = read_ours(path)
        found = dotenv_values(stream=io.StringIO(text)) if text is not None else {}
    except NotOurs as error:
        raise SettingsError(
            f"{path} is not read, because {error}: make file and directory your own and nobody else's to write "
            "(chown, chmod go-w), remove it, or start from another directory."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}.") from error
    return {name: value for name, value in found.items() if value is not None}


def _given_by(source: Mapping[str, str]) -> dict[str, _Given]:
    found: dict[str, _Given] = {}
    for name, value in source.items():
        given = _Given(name, value)
        long = long_name(name)
        is_alias = name.removesuffix(_FILE) in ALIASES
        # Compose passes on as empty what is not set.
        if not long.startswith(PREFIX) or (not value and (given.is_file or is_alias)):
            continue
        before = found.get(long)
        if before and before.value and value and (before.is_file or given.is_file):
            raise SettingsError(f"{before.name} and {name} are both given: keep one of them.")
        if before is None or (value and not is_alias) or not before.value:
            found[long] = given
    return found


def _content(given: _Given) -> str:
    """Return what the file holds, without the line end that editors and `echo` put there."""
    shown, path = given.name, given.value
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"{shown} names {path}, which is no regular file.")
            # Who owns it is the business of those who mount secrets; a container's are rarely its user's.
            if status.st_mode & stat.S_IWOTH:
                raise SettingsError(f"{shown} names {path}, to which everybody may write: chmod o-w {path}.")
            content = file.read(_MAX_SECRET_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "this is no path"
        raise SettingsError(f"{shown} names {path!r}, which cannot be read: {why}.") from error
    try:
        text = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise SettingsError(f"{shown} names {path}, which is no UTF-8 text.") from None
    if not text or len(content) > _MAX_SECRET_BYTES:
        what = "is empty" if not text else f"is larger than {_MAX_SECRET_BYTES} bytes"
        raise SettingsError(f"{shown} names {path}, which {what}.")
    return text
