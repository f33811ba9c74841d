"""A pgbouncer that pools transactions, in front of a test's Postgres."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import make_url

from dovecote.processes.children import ServerUser, runs_as
from tests.support.processes import a_place_for_servers, eventually

PGBOUNCER = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin")


@contextmanager
def pooled_url(direct: str, *, takes_options: bool = True) -> Iterator[str]:
    """Give a URL that leads to the same database through a pool of transactions."""
    with a_place_for_servers() as place, _pgbouncer(place, direct, takes_options) as port:
        url = make_url(direct).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        eventually(lambda: _answers(url), 10, "a pgbouncer that answers")
        yield url


def _pgbouncer(place: Path, direct: str, takes_options: bool) -> "_Running":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    to = conninfo_to_dict(direct)
    (place / "users").write_text(f'"{to["user"]}" "{to.get("password", "")}"\n')
    (place / "ini").write_text(
        f"[databases]\n* = host={to['host']} port={to['port']} password={to.get('password', '')}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\npool_mode = transaction\n"
        f"auth_type = plain\nauth_file = {place / 'users'}\n"
        + ("ignore_startup_parameters = options\n" if takes_options else "")
    )
    return _Running([str(PGBOUNCER), "-q", str(place / "ini")], port)


class _Running:
    """A process for the length of a block; pgbouncer, like Postgres, will not run as root."""

    def __init__(self, command: list[str], port: int) -> None:
        self._command, self._port = command, port

    def __enter__(self) -> int:
        self._process = subprocess.Popen(self._command, **runs_as(ServerUser.chosen()))
        return self._port

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)


def _answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True
