"""Kill real processes in the middle of the work; everything must still be there, once."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pytest
import sqlalchemy.exc

from dovecote import operations
from dovecote.processes.state_directory import StateDirectory
from dovecote.store.connections import connect
from tests.support.clusters import put_cluster
from tests.support.exact_counts import count_everything
from tests.support.processes import a_place_for_servers, are_there, eventually
from workers.routes import ROUTES

_ROWS, _ROWS_IF_LONG = 2_000, 6_000
_SYMBOLS = 30


@dataclass
class RunningSystem:
    """A `dovecote up` of its own, with everything it started."""

    home: Path
    process: "subprocess.Popen[bytes]"

    @property
    def environment(self) -> dict[str, str]:
        return {**_environment(), "DOVECOTE_HOME": str(self.home)}

    def ours(self, words: str) -> list[psutil.Process]:
        """The processes below `dovecote up` whose command line has these words."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if words in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:
                continue
        return found

    def database_url(self) -> str:
        running = StateDirectory(self.home).running()
        assert running, "the system announced itself"
        return running.environment["DATABASE_URL"]

    def status(self) -> operations.status.Status:
        engine = connect(self.database_url())
        try:
            return operations.status.get_status(engine, ROUTES)
        finally:
            engine.dispose()

    def is_quiet(self) -> bool:
        engine = connect(self.database_url())
        try:
            return count_everything(engine, ROUTES).is_quiet
        finally:
            engine.dispose()


@pytest.fixture(scope="module")
def running() -> Iterator[RunningSystem]:
    """One for the module, because it takes seven processes; the last test ends it."""
    with a_place_for_servers() as place, _up(place / "home") as system:
        yield system


def test_relay_and_workers_killed_in_the_middle_of_an_import_lose_and_double_nothing(
    running: RunningSystem, tmp_path: Path, is_long: bool
) -> None:
    rows = _ROWS_IF_LONG if is_long else _ROWS
    file = _prices(tmp_path, rows)
    importing = subprocess.Popen(
        [sys.executable, "-m", "dovecote", "ingest", "prices", str(file), "--per-transaction", "10"],
        env=running.environment,
        stdout=subprocess.DEVNULL,
    )

    kills = 0
    while importing.poll() is None:
        victims = [*running.ours("dovecote relay"), *running.ours("--queues pricing")]
        if victims:
            random.choice(victims).kill()
            kills += 1
        time.sleep(0.3)  # a pace, not a wait: another kill every 0.3 s for as long as the import takes

    assert importing.returncode == 0
    assert kills > 3
    eventually(running.is_quiet, 60, "a quiet system after the kills")
    assert running.status().handlers["pricing.apply_quotes"].processed == rows
    with psycopg.connect(running.database_url()) as connection:
        applied = connection.execute("select sum(quotes_applied), count(*) from dovecote.latest_prices").fetchone()
        newest = connection.execute(
            """
            select count(*) from dovecote.latest_prices l
            join (select distinct on (symbol) symbol, as_of, price from dovecote.price_quotes
                  order by symbol, as_of desc) newest using (symbol, as_of, price)
            """
        ).fetchone()
    assert applied == (rows, _SYMBOLS)
    assert newest == (_SYMBOLS,)


def test_a_killed_system_leaves_no_process_behind_and_finds_its_data_again() -> None:
    with a_place_for_servers() as place:
        with _up(place / "home") as first:
            _demo(first)
            everything = [child.pid for child in psutil.Process(first.process.pid).children(recursive=True)]
            first.process.send_signal(signal.SIGKILL)
            first.process.wait()
            eventually(lambda: not are_there(everything), 30, "no process left of a killed system")

        with _up(place / "home") as second:
            assert second.status().relay.published == 100


def test_servers_that_are_killed_are_started_again(running: RunningSystem) -> None:
    published = running.status().relay.published
    for words in ("-server - --dir", "postgres -D"):
        (server,) = [one for one in running.ours(words) if one.ppid() == running.process.pid]

        server.kill()

        eventually(partial(running.ours, words), 20, f"another {words}")
    eventually(lambda: _leads(running), 30, "a relay that leads again")
    _demo(running)
    assert running.status().relay.published == published + 100


def _leads(system: RunningSystem) -> bool:
    try:
        return system.status().relay.leading
    except sqlalchemy.exc.OperationalError:
        return False


def test_ctrl_c_stops_everything(running: RunningSystem) -> None:
    everything = [child.pid for child in psutil.Process(running.process.pid).children(recursive=True)]

    running.process.send_signal(signal.SIGINT)

    assert running.process.wait(30) == 0
    assert not are_there(everything)
    assert StateDirectory(running.home).running() is None


def _demo(system: RunningSystem) -> None:
    subprocess.run(
        [sys.executable, "-m", "dovecote", "demo", "--events", "100"],
        env=system.environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def _up(home: Path) -> Iterator[RunningSystem]:
    if not home.exists():
        put_cluster(home / "servers" / "postgres")
    process = subprocess.Popen(
        [sys.executable, "-m", "dovecote", "up"],
        env={**_environment(), "DOVECOTE_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    system = RunningSystem(home, process)
    try:
        eventually(lambda: StateDirectory(home).running() is not None, 30, "a system that announces itself")
        eventually(lambda: system.status().relay.leading, 30, "a relay that leads")
        yield system
    finally:
        process.terminate()
        process.wait(60)


def _environment() -> dict[str, str]:
    # The servers of the test run are none of this system's: it starts its own.
    return {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL")}


def _prices(directory: Path, count: int) -> Path:
    file = directory / "prices.csv"
    began = datetime(2026, 1, 1, tzinfo=UTC)
    rows = (f"S{n % _SYMBOLS},{n + 1}.5,{(began + timedelta(minutes=n)).isoformat()}" for n in range(count))
    file.write_text("symbol,price,at\n" + "\n".join(rows) + "\n")
    return file
