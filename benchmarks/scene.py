"""A fresh database and Redis namespace, and the real processes that work on them.

Everything runs as in production: the relay as `dovecote relay`, consumers under Dramatiq's own command line.
What is timed ends with a timestamp that Postgres took, so that watching it costs next to nothing.
"""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import redis
from psycopg.rows import TupleRow

from dovecote.processes.children import dying_with_us

_ROOT = Path(__file__).resolve().parents[1]
_STOP_SECONDS = 25.0
APPEND_ONLY = ("outbox", "published_batches")


class BenchmarkFailed(Exception):
    """Something did not happen that had to; the message says what, and ends with the processes' last words."""


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
                cwd=_ROOT,
                # Metrics on, as in production.
                env={**self.environment, "DOVECOTE_TELEMETRY__HTTP_PORT": str(_free_port()), **more},
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=dying_with_us(signal.SIGTERM),
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def start_relay(self, words: Sequence[str] = ("workers.relay",), **more: str) -> Process:
        """Start `dovecote relay`, or what stands for it, and return once it sleeps."""
        process = self.start("relay", words, **more)
        held = "select exists (select from pg_locks where locktype = 'advisory' and granted and mode = 'ExclusiveLock'"
        held += " and (classid::bigint << 32 | objid::bigint) = dovecote.wakeup_key() and database ="
        held += " (select oid from pg_database where datname = current_database()))"
        self.until(lambda: self.one(held), 60, "the relay leads and sleeps")
        return process

    @contextmanager
    def relay_on_standby(self, words: Sequence[str] = ("workers.relay",), **more: str) -> Iterator[None]:
        """Start `dovecote relay`, or what stands for it, and keep it from leading until the end of the block."""
        # In a session of its own: the lock lives in a transaction, and ends with it.
        with psycopg.connect(self.database_url) as leader:
            leader.execute("lock table dovecote.relay_leader in share update exclusive mode")
            self.start("relay", words, DOVECOTE_RELAY__STANDBY_INTERVAL_SECONDS="0.05", **more)
            standing_by = "select exists (select from pg_stat_activity where application_name = 'dovecote relay lock'"
            standing_by += " and datname = current_database() and state = 'idle' and query = 'rollback')"
            self.until(lambda: self.one(standing_by), 60, "the relay stands by")
            yield

    def start_consumers(
        self,
        module: str = "workers.consumers:start",
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
        return {name: dead for name, (dead, _) in self._tables().items() if name in APPEND_ONLY}

    def table_bytes(self) -> dict[str, int]:
        """Return the size of every table of ours with its indexes, partitions added up."""
        return {name: size for name, (_, size) in self._tables().items()}

    def _tables(self) -> dict[str, tuple[int, int]]:
        rows = self.connection.execute(
            "select regexp_replace(relname, '_(default|old_[0-9]+|[0-9]+w[0-9]+)$', ''), sum(n_dead_tup)::bigint,"
            " sum(pg_total_relation_size(relid))::bigint"
            " from pg_stat_user_tables where schemaname = 'dovecote' group by 1 order by 1"
        )
        return {str(name): (int(dead), int(size)) for name, dead, size in rows}

    @property
    def _heartbeats(self) -> str:
        return f"{self.namespace}:__heartbeats__"


def _free_port() -> int:
    with socket.socket() as keeper:
        keeper.bind(("127.0.0.1", 0))
        port: int = keeper.getsockname()[1]
    return port
