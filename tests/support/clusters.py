"""A Postgres cluster that is migrated already, made once a checkout and copied for every server that begins.

`initdb` and the migrations take seconds of two cores, and every worker of pytest-xdist has servers of its own, as have
tests that kill one. A copy takes a tenth of a second. The cluster lies in `.cache`, under a name that changes with the
version of Postgres and with the code.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg

from dovecote.local.binaries import find_postgres
from dovecote.local.servers import Postgres
from tests.support.migrations import LOCATIONS
from tests.support.processes import a_place_for_servers

ROOT = Path(__file__).parents[2]
#: A migrated database that nobody connects to, beside `dovecote`, which is migrated too.
TEMPLATE = "dovecote_template"

_CLUSTERS = ROOT / ".cache" / "clusters"
_CODE = ("dovecote", "domain", "migrations", "workers")


def put_cluster(directory: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Put a copy where a `Postgres(directory)` will find it at its start, as if it had run there before."""
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    with _cluster(environ) as cluster:
        for name in ("data", "password"):
            # `cp`, because the copy keeps the owner: for root the server runs as another user.
            subprocess.run(["/bin/cp", "-a", str(cluster / name), str(directory)], check=True)


@contextmanager
def _cluster(environ: Mapping[str, str]) -> Iterator[Path]:
    """Give a cluster that nobody removes until the end of the block; make it if it is missing."""
    _CLUSTERS.mkdir(parents=True, exist_ok=True)
    version, digest = _version(environ), _digest()
    cluster = _CLUSTERS / f"{version}-{digest}"
    lock = os.open(_CLUSTERS, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not cluster.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not cluster.exists():
            for outdated in (*_CLUSTERS.glob(f"{version}-*"), *_CLUSTERS.glob("new-*")):
                shutil.rmtree(outdated)
            _make(cluster, environ)
        yield cluster
    finally:
        os.close(lock)


def _make(cluster: Path, environ: Mapping[str, str]) -> None:
    from dovecote.migrations import schema  # Alembic takes half a second to import

    with a_place_for_servers() as place:
        postgres = Postgres(place / "postgres", {"fsync": "off"}, environ=environ)
        try:
            url = postgres.start().url
            schema.upgrade(url, locations=LOCATIONS)
            with psycopg.connect(url, dbname="postgres", autocommit=True) as connection:
                connection.execute(f"create database {TEMPLATE} template dovecote")
        finally:
            postgres.stop()
        unfinished = cluster.with_name(f"new-{cluster.name}")
        subprocess.run(["/bin/cp", "-a", str(postgres.directory), str(unfinished)], check=True)
        unfinished.rename(cluster)


def _version(environ: Mapping[str, str]) -> str:
    """Return the major version with a digest of the program's path: `18-1a2b3c4d`."""
    path = find_postgres(environ).path
    said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=True).stdout
    return f"{said.partition(') ')[2].partition('.')[0]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def _digest() -> str:
    """Change with all that the migrations could read, and with what is done here."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for folder in _CODE:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".sql"):
                digest.update(os.fsencode(file) + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
