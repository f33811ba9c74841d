"""The benchmarks run and say what they promise; and what makes the relay quick is counted, not timed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import plots
from dovecote.bootstrap import publisher_for
from dovecote.broker.publisher import Publisher
from dovecote.processes.stop_flag import HasFileno, StopFlag
from dovecote.relay import leader as leading
from dovecote.relay import replayer as replaying
from dovecote.relay.history import History
from dovecote.relay.leader import Leader
from dovecote.settings import Settings
from dovecote.store.connections import connect, sessions_for
from dovecote.store.reader import Reader
from dovecote.store.relay_state import take_over
from dovecote.unit_of_work import unit_of_work
from tests.support.processes import eventually
from workers.routes import ROUTES

_ROOT = Path(__file__).parents[1]
_BATCH = 100


def test_a_benchmark_prints_what_it_measured() -> None:
    command = [sys.executable, "-m", "benchmarks", "relay", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--events", "2000"], cwd=_ROOT, capture_output=True, text=True, timeout=100
    )

    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert {"name", "unit", "ours", "naive", "limit", "ratio", "rounds", "reached", "machine", "details"} == set(report)
    assert report["name"] == "relay"
    assert all(report[variant] > 0 for variant in ("ours", "naive", "limit"))
    assert set(report["ratio"]) == {"naive", "limit"}
    assert len(report["rounds"]["ours"]) == 1
    assert report["details"]["n_dead_tup"] == {"outbox": 0, "published_batches": 0}
    first, second = report["details"]["bytes_per_event_of_each_load"]["outbox"]
    assert 0.5 * first < second < 1.5 * first


def test_an_unknown_benchmark_is_refused_with_those_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nothing"], cwd=_ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 2
    assert "latency" in done.stderr


_CURVES = {
    "by_processes": [{"processes": n, "events_per_second": 1e4, "p50_ms": 2.0, "p99_ms": 9.0} for n in (1, 2)],
    "by_bundle_size": [
        {"bundle_size": n, "relay_events_per_second": 1e5, "events_per_second": 1e4, "p50_ms": 2.0, "p99_ms": 9.0}
        for n in (1, 500)
    ],
    "by_load": [{"load": n, "events_per_second": float(n), "p50_ms": 2.0, "p99_ms": 9.0} for n in (10, 1_000)],
}


def test_the_curves_of_scale_become_pictures(tmp_path: Path) -> None:
    files = plots.draw(_CURVES, 1_000, tmp_path)

    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(Path(file).name for file in files)
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".svg"}
    assert "events/s" in (tmp_path / "load.svg").read_text()


def test_without_matplotlib_a_sentence_says_how_to_get_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert "pip install" in plots.draw(_CURVES, 1_000, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.servers
def test_a_batch_costs_three_statements_and_one_script(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading, publishing and recording a batch more: low watermark, rows, record; and one EVALSHA."""
    # What is done by the clock would be counted with the batches on a slow machine.
    monkeypatch.setattr(leading, "_TICK_SECONDS", 3_600.0)
    monkeypatch.setattr(replaying, "_POLL_INTERVAL_SECONDS", 3_600.0)
    few = _lead_through(settings, batches=2)
    many = _lead_through(settings, batches=12)

    assert (many.statements - few.statements) / 10 <= 3
    # A heartbeat that falls into one of them is no batch's.
    assert (many.scripts - few.scripts) // 10 <= 1
    # Nothing is read twice and nothing is read over: a row published is a row read by index.
    assert many.rows_read <= 1.1 * 12 * _BATCH


class _Counted:
    """What a leadership did."""

    statements = 0
    scripts = 0
    rows_read = 0


class _UntilNothingIsLeft(StopFlag):
    """Stops the leader when it would sleep until it is woken."""

    def sleep(self, seconds: float, watched: HasFileno | None = None) -> bool:
        if watched is not None:
            self.set()
        return True


def _lead_through(settings: Settings, batches: int) -> _Counted:
    counted = _Counted()

    class CountingCursor(psycopg.Cursor[TupleRow]):
        def execute(self, *args: Any, **options: Any) -> "CountingCursor":
            counted.statements += 1
            return super().execute(*args, **options)

    url = settings.database.url.get_secret_value()
    engine = connect(url)
    _write(sessions_for(engine), batches * _BATCH)
    engine.dispose()
    broker = publisher_for(settings, ROUTES)
    scripts, read = _scripts(broker), _rows_read(url)
    guarded = "-c enable_seqscan=off -c enable_bitmapscan=off -c enable_sort=off"
    with psycopg.connect(url, autocommit=True, options=guarded, cursor_factory=CountingCursor) as connection:
        taken = take_over(connection, 0, "a test")
        history = History(taken, connection=connection, broker=broker)
        history.verify_redis(lambda: None)
        Leader(
            connection=connection,
            reader=Reader(connection, taken.checkpoint, _BATCH),
            broker=broker,
            routes=ROUTES,
            settings=settings.relay.model_copy(update={"batch_size": _BATCH}),
            stop=_UntilNothingIsLeft(),
            history=history,
        ).lead()
    counted.scripts = _scripts(broker) - scripts
    # A session reports to the statistics when it ends.
    eventually(lambda: _rows_read(url) >= read + batches * _BATCH, 10, "the rows read are counted")
    counted.rows_read = _rows_read(url) - read
    return counted


def _write(sessions: sessionmaker[Session], events: int) -> None:
    from datetime import UTC, datetime
    from decimal import Decimal

    from domain.pricing import PriceQuoted

    now = datetime.now(UTC)
    with unit_of_work(sessions) as uow:
        for number in range(events):
            uow.emit(PriceQuoted(symbol=f"s{number % 10}", price=Decimal(1), as_of=now, occurred_at=now))


def _scripts(broker: Publisher) -> int:
    found: Any = broker.client.info("commandstats")
    return int(found.get("cmdstat_evalsha", {}).get("calls", 0))


def _rows_read(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "select coalesce(sum(idx_tup_fetch + seq_tup_read), 0) from pg_stat_user_tables"
            " where schemaname = 'dovecote' and relname ~ '^outbox_'"
        ).fetchone()
    assert row is not None
    return int(row[0])
