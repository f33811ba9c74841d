"""The system under test, and the hands that faults lay on it.

Real servers (dovecote/local/servers.py) and the real `dovecote up` with a Procfile of its own: whatever of it is
killed, its own supervisor starts again, with its own pauses. Servers are started again by the fault that
stopped them. Writers are services, not Dovecote's: the stage starts them again at once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
import redis
import sqlalchemy.exc
from psycopg.rows import TupleRow
from sqlalchemy import make_url

from dovecote import operations
from dovecote.local.servers import Postgres, Redis
from dovecote.processes.children import dying_with_us
from dovecote.processes.state_directory import StateDirectory
from dovecote.store.connections import connect
from tests.chaos import routes, writers
from tests.chaos.commits import PostgresProxy
from tests.chaos.databases import Databases
from tests.chaos.history import Rewind
from tests.support.clusters import put_cluster
from tests.support.processes import eventually
from tests.support.proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]
WRITERS = 3
_STOPPED_WITHIN_SECONDS = 40


class Moot(Exception):
    """A fault finds nothing that it could befall now."""


class Stage:
    """Everything of one run. Used from the main thread only: it starts servers."""

    def __init__(self, directory: Path, events_per_second: float) -> None:
        self.directory = directory
        self.databases = Databases(directory / "servers")
        self.redis = Redis(directory / "servers" / "redis")
        # About two events a transaction.
        self._per_writer = events_per_second / WRITERS / 2
        self._up: subprocess.Popen[bytes] | None = None
        self._writers: dict[str, subprocess.Popen[bytes]] = {}
        self._leader: int | None = None
        self.proxies: dict[str, Proxy] = {}
        #: How often Postgres went back in time, and how far.
        self.rewinds: list[Rewind] = []

    @contextmanager
    def standing(self) -> Iterator["Stage"]:
        """Build it all up, writers excepted; take it all down however this ends."""
        for name in ("logs", "journals", "home", "servers"):
            (self.directory / name).mkdir()
        (self.directory / "servers").chmod(0o711)
        with ExitStack() as stack:
            put_cluster(self.directory / "servers" / "postgres")
            stack.callback(self.databases.stop)
            self.postgres_url = self.databases.start()
            stack.callback(self.redis.stop)
            self.redis_url = self.redis.start().url
            with self.connection() as connection:
                connection.execute(routes.TABLES)
            writers.open_accounts(self.postgres_url)
            for role, server in (
                ("relay", "postgres"),
                ("relay", "redis"),
                ("workers", "postgres"),
                ("workers", "redis"),
                ("writers", "postgres"),
            ):
                port = make_url(self.postgres_url if server == "postgres" else self.redis_url).port
                assert port is not None
                proxy = PostgresProxy(port) if server == "postgres" else Proxy(port)
                self.proxies[f"{role} to {server}"] = stack.enter_context(proxy)
            stack.callback(self._stop_processes)
            self._start_system()
            yield self

    def _start_system(self) -> None:
        procfile = self.directory / "Procfile"
        procfile.write_text(routes.PROCFILE)
        self._up = self._start("system", ["dovecote", "up", "--procfile", str(procfile)])
        eventually(
            lambda: StateDirectory(self.directory / "home").running() is not None, 60, "a system that announces itself"
        )
        eventually(lambda: self.status().relay.leading and len(self.workers()) == 4, 60, "a leader and four workers")

    def _start(self, name: str, words: list[str]) -> "subprocess.Popen[bytes]":
        with (self.directory / "logs" / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=dying_with_us(signal.SIGTERM),
            )

    def _environment(self) -> dict[str, str]:
        ports: dict[str, dict[str, int]] = {}
        for name, proxy in self.proxies.items():
            role, _, server = name.partition(" to ")
            ports.setdefault(role, {})[server] = proxy.port
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("DOVECOTE_", "PG"))}
        return {
            **ours,
            **{name: value for name, value in os.environ.items() if name.startswith("DOVECOTE_") and "_BIN" in name},
            # The proxies read what Postgres says.
            "DATABASE_URL": f"{self.postgres_url}?sslmode=disable&gssencmode=disable",
            "REDIS_URL": self.redis_url,
            "DOVECOTE_APP": "workers.app:app",
            "DOVECOTE_HOME": str(self.directory / "home"),
            "PYTHONPATH": str(ROOT),
            "CHAOS_DIRECTORY": str(self.directory),
            "CHAOS_PORTS": json.dumps(ports),
        }

    # Writers -----------------------------------------------------------------------------------

    def keep_writing(self) -> None:
        """Start the writers that are not there."""
        for number in range(1, WRITERS + 1):
            name = f"writer-{number}"
            if name not in self._writers or self._writers[name].poll() is not None:
                self._writers[name] = self._start(name, ["tests.chaos.writers", name, str(self._per_writer)])

    def stop_writing(self) -> None:
        """Let the writers finish what they are at."""
        for writer in self._writers.values():
            writer.terminate()
        for writer in self._writers.values():
            try:
                writer.wait(_STOPPED_WITHIN_SECONDS)
            except subprocess.TimeoutExpired:
                writer.kill()
                writer.wait()
        self._writers.clear()

    # Who is who --------------------------------------------------------------------------------

    def leader(self) -> psutil.Process:
        """The relay that leads; the last one known while Postgres cannot be asked."""
        with suppress(psycopg.Error), self.connection() as connection:
            row = connection.execute("select split_part(owner, ':', 2)::int from dovecote.relay_state").fetchone()
            self._leader = row[0] if row else None
        return one_of([relay for relay in self.relays() if relay.pid == self._leader], 0, "no relay leads")

    def standby(self) -> psutil.Process:
        leader = self.leader().pid
        return one_of([relay for relay in self.relays() if relay.pid != leader], 0, "no relay stands by")

    def relays(self) -> list[psutil.Process]:
        return [one for one in self._children() if "tests.chaos.processes" in one.cmdline()]

    def masters(self) -> list[psutil.Process]:
        return [one for one in self._children() if any(word.endswith("dramatiq") for word in one.cmdline()[:2])]

    def workers(self) -> list[psutil.Process]:
        """The worker processes; each has the command line of its master, which forked it."""
        found = []
        for master in self.masters():
            with suppress(psutil.Error):
                command = master.cmdline()
                found += [child for child in master.children() if child.cmdline() == command]
        return found

    def writers(self) -> list[psutil.Process]:
        return [psutil.Process(writer.pid) for writer in self._writers.values() if writer.poll() is None]

    def _children(self) -> list[psutil.Process]:
        assert self._up is not None
        found = []
        for child in psutil.Process(self._up.pid).children():
            with suppress(psutil.Error):
                if child.cmdline():  # a zombie has none
                    found.append(child)
        return found

    # Servers -----------------------------------------------------------------------------------

    def connection(self) -> psycopg.Connection[TupleRow]:
        """A way to Postgres that no fault of the network troubles."""
        return psycopg.connect(self.postgres_url, autocommit=True, connect_timeout=5)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url, socket_timeout=5)

    @property
    def postgres(self) -> Postgres:
        """The primary."""
        return self.databases.primary

    def promote_standby(self) -> None:
        """Let the standby take the place of a primary that is gone."""
        self.postgres_url = self.databases.promote_standby()
        self._lead_proxies_to("postgres", self.postgres_url)

    def start_postgres(self) -> None:
        self.postgres_url = self.databases.start()
        self._lead_proxies_to("postgres", self.postgres_url)

    def start_redis(self) -> None:
        self.redis_url = self.redis.start().url
        self._lead_proxies_to("redis", self.redis_url)

    def _lead_proxies_to(self, server: str, url: str) -> None:
        # The last port is taken again if it is free, and it nearly always is.
        port = make_url(url).port
        assert port is not None
        for name, proxy in self.proxies.items():
            if name.endswith(server):
                proxy.lead_to(port)

    # How it stands -----------------------------------------------------------------------------

    def status(self) -> operations.status.Status:
        engine = connect(self.postgres_url)
        try:
            return operations.status.get_status(engine, routes.ROUTES)
        finally:
            engine.dispose()

    def left_on_queues(self) -> int:
        """Return how many messages Redis still holds, in hand or waiting."""
        client = self.client()
        try:
            return sum(int(client.hlen(key)) for key in client.scan_iter("dovecote:*.msgs"))
        finally:
            client.close()

    def wait_until_quiet(self, within_seconds: float) -> float | None:
        """Return how long it took until nothing was due, and nothing on a queue; None if it did not come to that."""
        began = time.monotonic()
        while time.monotonic() - began < within_seconds:
            # Postgres may still be recovering from the last fault.
            with suppress(sqlalchemy.exc.OperationalError, redis.RedisError):
                if not self._is_anything_due() and not self.left_on_queues():
                    return time.monotonic() - began
            time.sleep(0.2)  # a pace: each look reads whole tables
        return None

    def _is_anything_due(self) -> bool:
        status = self.status()
        return status.relay.lag_events > 0 or any(one.unprocessed for one in status.handlers.values())

    def _stop_processes(self) -> None:
        for proxy in self.proxies.values():
            proxy.heal()
        self.stop_writing()
        if self._up is not None:
            self._up.terminate()
            try:
                self._up.wait(_STOPPED_WITHIN_SECONDS)
            except subprocess.TimeoutExpired:
                self._up.kill()
                self._up.wait()


def one_of(processes: list[psutil.Process], dice: float, otherwise: str) -> psutil.Process:
    """Let the dice choose."""
    if not processes:
        raise Moot(otherwise)
    return processes[min(int(dice * len(processes)), len(processes) - 1)]
