"""Archives of dropped weeks: a directory with one file of compressed JSON lines a table, and a manifest.

It appears under its name only when it is complete, on disk, and read back. Its name and its bytes follow
from its content alone: to write the same week again is to find the same archive.
"""

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovecote.errors import DovecoteError

FORMAT = "dovecote archive, version 1"


class CannotArchive(DovecoteError):
    """The archive could not be written or does not read back as it was written; nothing was dropped."""


@dataclass(frozen=True)
class Archive:
    """A complete archive on disk; `checksum` is the SHA-256 of its manifest, in hex."""

    path: Path
    checksum: str
    rows: Mapping[str, int]


def write(directory: Path, name: str, about: Mapping[str, Any], tables: Mapping[str, Iterable[str]]) -> Archive:
    """Write one archive and return it, verified.

    Shape:  `tables` gives for each table its rows as JSON objects on one line; `about` goes into the manifest.
    Errors: CannotArchive, also when the disk is full.
    """
    partial = directory / f".{name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
        files = {table: _write_lines(partial / f"{table}.jsonl.gz", lines) for table, lines in tables.items()}
        manifest = json.dumps({"format": FORMAT, **about, "files": files}, indent=2, sort_keys=True) + "\n"
        with _synced(partial / "manifest.json") as file:
            file.write(manifest.encode())
        _sync_directory(partial)
        checksum = hashlib.sha256(manifest.encode()).hexdigest()
        final = directory / f"{name}-{checksum[:12]}"
        if final.exists():
            shutil.rmtree(partial)  # the same content, from a run that ended before the week was dropped
        else:
            partial.rename(final)
        _sync_directory(directory)
        found = read(final)
    except OSError as error:
        raise CannotArchive(f"{directory}: the archive of {name} could not be written: {error}") from error
    if found.checksum != checksum:
        raise CannotArchive(f"{final}: its manifest is not the one that was written")
    return found


def read(path: Path) -> Archive:
    """Check an archive against its manifest, file by file and row by row.

    Errors: CannotArchive naming the file that is missing or damaged.
    """
    try:
        raw = (path / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise CannotArchive(f"{path}: the format is {manifest['format']!r}, not {FORMAT!r}")
        for expected in manifest["files"].values():
            if (found := _measured(path / expected["file"])) != expected:
                raise CannotArchive(f"{path / expected['file']}: damaged: {found} instead of {expected}")
        rows = {table: expected["rows"] for table, expected in manifest["files"].items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CannotArchive(f"{path}: no archive of ours, or a damaged one: {error}") from error
    return Archive(path, hashlib.sha256(raw).hexdigest(), rows)


def rows(path: Path, table: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one table of an archive."""
    with gzip.open(path / f"{table}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _write_lines(path: Path, lines: Iterable[str]) -> dict[str, Any]:
    content, count = hashlib.sha256(), 0
    # Neither a name nor a time in the header: the same rows give the same bytes.
    with _synced(path) as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        for line in lines:
            data = line.encode() + b"\n"
            packed.write(data)
            content.update(data)
            count += 1
    return {
        "file": path.name,
        "rows": count,
        "content_sha256": content.hexdigest(),
        "sha256": _digest(path),
        "bytes": path.stat().st_size,
    }


def _measured(path: Path) -> dict[str, Any]:
    content, count = hashlib.sha256(), 0
    with gzip.open(path, "rb") as lines:
        for line in lines:
            content.update(line)
            count += 1
    return {
        "file": path.name,
        "rows": count,
        "content_sha256": content.hexdigest(),
        "sha256": _digest(path),
        "bytes": path.stat().st_size,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _synced(path: Path) -> Iterator[Any]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
