"""Through a transaction-pooling proxy neither LISTEN nor session locks work; the relay finds out and says so."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import make_url

from tests.conftest import settings_for
from tests.support import a_place_for_servers, eventually
from workers.bootstrap import relay_for
from workers.children import ServerUser, runs_as
from workers.relay.relay import NoSession
from workers.settings import Settings

PGBOUNCER = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin")

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed (apt-get install pgbouncer)"),
]


@pytest.fixture
def pooled(settings: Settings, tmp_path: Path) -> Iterator[Settings]:
    """Settings that lead through a pgbouncer in transaction mode."""
    direct = settings.database.url.get_secret_value()
    with a_place_for_servers() as place, _pgbouncer(place, direct) as port:
        url = make_url(direct).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
        eventually(lambda: _answers(url), 10, "a pgbouncer that answers")
        yield settings_for(url, settings.redis.url.get_secret_value(), tmp_path)


def test_a_relay_behind_a_transaction_pool_says_what_is_wrong(pooled: Settings) -> None:
    with pytest.raises(NoSession, match="a proxy that pools transactions"):
        relay_for(pooled).run()


def _pgbouncer(place: Path, direct: str) -> "_Running":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    to = conninfo_to_dict(direct)
    (place / "users").write_text(f'"{to["user"]}" "{to.get("password", "")}"\n')
    (place / "ini").write_text(
        f"[databases]\n* = host={to['host']} port={to['port']} password={to.get('password', '')}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\npool_mode = transaction\n"
        f"auth_type = plain\nauth_file = {place / 'users'}\nignore_startup_parameters = options\n"
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
