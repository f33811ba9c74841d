"""Servers, fresh databases and real processes for a benchmark, and the clock that all of them share.

Everything measured runs as in production: the relay as `dovecote relay`, consumers under Dramatiq's own
command line, durable servers, telemetry sent to a collector (a sink in this process). What is timed ends
with a timestamp that Postgres took, so that watching it costs next to nothing.
"""

import base64
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import redis
from psycopg import sql
from psycopg.rows import TupleRow
from sqlalchemy import make_url

from workers import schema
from workers.children import dying_with_us
from workers.embedded import servers as embedded_servers

ROOT = Path(__file__).resolve().parents[1]
_STOP_SECONDS = 25.0
# What an operator would give a busy Postgres; with 1 GB checkpoints would be most of what is measured.
POSTGRES = {"fsync": "on", "synchronous_commit": "on", "max_wal_size": "4GB", "shared_buffers": "512MB"}
REDIS = {"appendonly": "yes", "appendfsync": "everysec"}


class BenchmarkFailed(Exception):
    """Something did not happen that had to; the message says what, and ends with the processes' last words."""


@dataclass(frozen=True)
class Options:
    """How much to do. `rounds` and `events` win over what the benchmark would choose."""

    quick: bool = False
    rounds: int | None = None
    events: int | None = None
    say: Callable[[str], None] = lambda _: None

    def repeat(self, full: int = 3, quick: int = 1) -> range:
        return range(self.rounds or (quick if self.quick else full))

    def size(self, full: int, quick: int) -> int:
        return self.events or (quick if self.quick else full)


@dataclass
class Process:
    """A child of ours and its log."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def stop(self, within_seconds: float = _STOP_SECONDS) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            self.popen.wait(within_seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def last_words(self) -> str:
        return f"{self.name}: {self.log.read_text(errors='replace')[-1500:]}"


@dataclass
class Scene:
    """A fresh database and Redis namespace, and the processes that work on them."""

    database_url: str
    redis_url: str
    namespace: str
    directory: Path
    environment: Mapping[str, str]
    connection: psycopg.Connection[TupleRow]
    client: redis.Redis
    processes: list[Process] = field(default_factory=list)

    def start(self, name: str, words: Sequence[str], **more: str) -> Process:
        """Start a program of this checkout."""
        log = self.directory / f"{name}-{len(self.processes)}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env={**self.environment, **more},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=dying_with_us(signal.SIGTERM),
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def start_relay(self) -> Process:
        """Start `dovecote relay` and return once it sleeps."""
        process = self.start("relay", ["workers", "relay"])
        held = "select exists (select from pg_locks where locktype = 'advisory' and granted and mode = 'ExclusiveLock'"
        held += " and (classid::bigint << 32 | objid::bigint) = dovecote.bell_key() and database ="
        held += " (select oid from pg_database where datname = current_database()))"
        self.until(lambda: self.one(held), 60, "the relay leads and sleeps")
        return process

    @contextmanager
    def relay_on_standby(self) -> Iterator[None]:
        """Start `dovecote relay` and keep it from leading until the end of the block."""
        self.connection.execute("select pg_advisory_lock(dovecote.leader_key())")
        self.start("relay", ["workers", "relay"], DOVECOTE_RELAY__STANDBY_SECONDS="0.05")
        standing_by = "select exists (select from pg_stat_activity where application_name = 'dovecote relay'"
        standing_by += " and datname = current_database())"
        self.until(lambda: self.one(standing_by), 60, "the relay stands by")
        yield
        self.connection.execute("select pg_advisory_unlock(dovecote.leader_key())")

    def start_consumers(
        self,
        module: str = "workers.bootstrap:consumers",
        *,
        queues: str = "pricing",
        processes: int = 1,
        threads: int = 2,
        more: Mapping[str, str] | None = None,
    ) -> Process:
        """Start Dramatiq's command line, as the Procfile does, and return once it looks at its queues."""
        before = int(self.client.zcard(self._heartbeats))
        words = ["dramatiq", module, "--queues", *queues.split(), "--processes", str(processes)]
        words += ["--threads", str(threads), "--skip-logging", "--worker-shutdown-timeout", "20000"]
        process = self.start("consumers", words, **(more or {}))
        self.until(
            lambda: int(self.client.zcard(self._heartbeats)) >= before + processes,
            60,
            "consumers look at their queues",
        )
        # A heartbeat comes with the first look at a queue; its other threads have none to wait for.
        time.sleep(0.5)
        return process

    def start_naive_relay(self, **more: str) -> Process:
        """Start the naive relay and return once it polls, so that its own start is not counted against it."""
        process = self.start("naive-relay", ["benchmarks.naive"], **more)
        connected = "select exists (select from pg_stat_activity where application_name = 'naive relay'"
        connected += " and datname = current_database())"
        self.until(lambda: self.one(connected), 60, "the naive relay polls")
        return process

    def until(self, condition: Callable[[], Any], within_seconds: float, what: str, every: float = 0.02) -> None:
        """Wait until it holds. Errors: BenchmarkFailed when it does not, or when a process has ended."""
        deadline = time.monotonic() + within_seconds
        while not condition():
            ended = [process for process in self.processes if process.popen.poll() not in (None, 0, -signal.SIGTERM)]
            if ended or time.monotonic() > deadline:
                words = "\n".join(process.last_words() for process in ended or self.processes)
                raise BenchmarkFailed(f"not within {within_seconds:g} s: {what}\n{words}")
            time.sleep(every)

    def one(self, query: str, *parameters: object) -> Any:
        """Return the first value of the first row."""
        row = self.connection.execute(query, parameters or None).fetchone()
        return row[0] if row else None

    def stop_processes(self) -> None:
        for process in self.processes:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.stop()
        self.processes.clear()

    def dead_tuples(self) -> dict[str, int]:
        """Return n_dead_tup of the tables that promise to have none. Call it when the processes have ended."""
        self.connection.execute("select pg_stat_force_next_flush()")
        rows = self.connection.execute(
            "select regexp_replace(relname, '_(default|[0-9]+w[0-9]+)$', ''), sum(n_dead_tup)::bigint"
            " from pg_stat_user_tables where schemaname = 'dovecote'"
            " and (relname ~ '^outbox_' or relname ~ '^published_batches_') group by 1 order by 1"
        )
        return {str(name): int(dead) for name, dead in rows}

    @property
    def _heartbeats(self) -> str:
        return f"{self.namespace}:__heartbeats__"


class Stage:
    """The servers of one benchmark."""

    def __init__(self, postgres_url: str, redis_url: str, directory: Path, collector: str) -> None:
        self.directory = directory
        self._postgres_url = postgres_url
        self._redis_url = redis_url
        self._collector = collector
        self._template = f"bench_template_{uuid4().hex[:8]}"
        self._statement("create database {}", self._template)
        schema.upgrade(self._database(self._template))

    @contextmanager
    def scene(self) -> Iterator[Scene]:
        """Give a database that is migrated and empty, and take everything away again at the end."""
        name, namespace = f"bench_{uuid4().hex[:8]}", f"bench-{uuid4().hex[:8]}"
        self._statement("create database {} template {}", name, self._template)
        url = self._database(name)
        with ExitStack() as stack:
            stack.callback(self._statement, "drop database {} with (force)", name)
            client = redis.Redis.from_url(self._redis_url)
            stack.callback(_forget, client, namespace)
            connection = stack.enter_context(psycopg.connect(url, autocommit=True))
            place = Path(tempfile.mkdtemp(dir=self.directory))
            scene = Scene(url, self._redis_url, namespace, place, self._environment(url, namespace), connection, client)
            stack.callback(scene.stop_processes)
            yield scene

    def close(self) -> None:
        self._statement("drop database {} with (force)", self._template)

    def versions(self) -> tuple[str, str]:
        """Return what the servers call themselves."""
        with psycopg.connect(self._postgres_url) as connection:
            postgres = f"PostgreSQL {connection.info.parameter_status('server_version')}"
        about: Any = redis.Redis.from_url(self._redis_url).info("server")
        valkey = about.get("valkey_version")
        return postgres, f"Valkey {valkey}" if valkey else f"Redis {about['redis_version']}"

    def _environment(self, database_url: str, namespace: str) -> dict[str, str]:
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOVECOTE_")}
        return {
            **kept,
            "DATABASE_URL": database_url,
            "REDIS_URL": self._redis_url,
            "DOVECOTE_HOME": str(self.directory),
            "DOVECOTE_REDIS__NAMESPACE": namespace,
            "DOVECOTE_PRIVACY__HASH_KEY": key,
            "DOVECOTE_PRIVACY__ENCRYPTION_KEYS": f"k1:{key}",
            "DOVECOTE_PRIVACY__CODE_KEY": key,
            "DOVECOTE_SMS__HANDSET_PATH": str(self.directory / "handset.txt"),
            "DOVECOTE_TELEMETRY__LOG_FORMAT": "json",
            "DOVECOTE_TELEMETRY__OTLP_ENDPOINT": self._collector,
        }

    def _database(self, name: str) -> str:
        return make_url(self._postgres_url).set(database=name).render_as_string(hide_password=False)

    def _statement(self, statement: str, *names: str) -> None:
        with psycopg.connect(self._postgres_url, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


@contextmanager
def stage(postgres_settings: Mapping[str, str] | None = None) -> Iterator[Stage]:
    """Start durable servers in a temporary place, or use the given ones, and clear up at the end."""
    given = os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL")
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="dovecote-bench-"))
        directory.chmod(0o711)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if given[0] and given[1]:
            urls = given[0], given[1]
        else:
            settings = {**POSTGRES, **(postgres_settings or {})}
            postgres, cache = stack.enter_context(
                embedded_servers(directory / "servers", postgres_settings=settings, redis_settings=REDIS)
            )
            urls = postgres.url, cache.url
        found = Stage(*urls, directory, stack.enter_context(_collector()))
        stack.callback(found.close)
        yield found


@contextmanager
def _collector() -> Iterator[str]:
    """Take traces and metrics in over OTLP/HTTP and forget them."""

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    threading.Thread(target=server.serve_forever, daemon=True, name="collector").start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _forget(client: redis.Redis, namespace: str) -> None:
    for key in client.scan_iter(f"{namespace}:*", count=1_000):
        client.unlink(key)
    client.close()
