"""Durable servers for a benchmark, and fresh databases on them; telemetry goes to a collector, a sink here."""

import base64
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import redis
from psycopg import sql
from sqlalchemy import make_url

from benchmarks.scene import BenchmarkFailed, Process, Scene
from dovecote.local.servers import servers as embedded_servers
from dovecote.migrations import schema
from workers.app import app

__all__ = ["BenchmarkFailed", "Options", "Process", "Scene", "Stage", "stage"]

# What an operator would give a busy Postgres; with 1 GB checkpoints would be most of what is measured.
POSTGRES = {"fsync": "on", "synchronous_commit": "on", "max_wal_size": "4GB", "shared_buffers": "512MB"}
REDIS = {"appendonly": "yes", "appendfsync": "everysec"}


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


class Stage:
    """The servers of one benchmark."""

    def __init__(self, postgres_url: str, redis_url: str, directory: Path, collector: str) -> None:
        self.directory = directory
        self._postgres_url = postgres_url
        self._redis_url = redis_url
        self._collector = collector
        self._template = f"bench_template_{uuid4().hex[:8]}"
        self._statement("create database {}", self._template)
        schema.upgrade(self._database(self._template), locations=app.migration_locations)

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
        hash_key, encryption_key, code_key = (base64.b64encode(secrets.token_bytes(32)).decode() for _ in range(3))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DOVECOTE_")}
        return {
            **kept,
            "DATABASE_URL": database_url,
            "REDIS_URL": self._redis_url,
            "DOVECOTE_HOME": str(self.directory),
            "DOVECOTE_REDIS__NAMESPACE": namespace,
            "DOVECOTE_PRIVACY__HASH_KEY": hash_key,
            "DOVECOTE_PRIVACY__ENCRYPTION_KEYS": f"k1:{encryption_key}",
            "DOVECOTE_PRIVACY__CODE_KEY": code_key,
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
