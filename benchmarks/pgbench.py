"""Writers that cost the machine next to nothing: pgbench where there is one, else threads with psycopg."""

import os
import re
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import psycopg

from benchmarks.harness import BenchmarkFailed, Scene
from dovecote.local.binaries import ServerError, find_postgres

# A domain row and its event, as a service writes them. The statements of a transaction go one by one.
_DOMAIN_ROW = """
    insert into dovecote.price_quotes (symbol, as_of, price) values ('s' || :symbol, clock_timestamp(), 1.25)
    on conflict (symbol, as_of) do update set price = excluded.price, recorded_at = excluded.recorded_at
"""
_EVENT = """
    insert into {table} (aggregate_type, aggregate_id, event_type, payload, headers)
    values ('price', 's' || :symbol, 'pricing.price_quoted.v1',
            ('{{"as_of": "2026-01-01T00:00:00+00:00", "price": "1.25", "symbol": "s' || :symbol ||
             '", "occurred_at": "2026-01-01T00:00:00+00:00", "remark": "{remark}"}}')::jsonb,
            '{{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}}')
"""
# The same for several symbols that a feed quotes at once.
_DOMAIN_ROWS = """
    insert into dovecote.price_quotes (symbol, as_of, price)
    select 's' || (:symbol + n) % 1000, clock_timestamp(), 1.25 from generate_series(1, {count}) n
    on conflict (symbol, as_of) do update set price = excluded.price, recorded_at = excluded.recorded_at
"""
_EVENTS = """
    insert into {table} (aggregate_type, aggregate_id, event_type, payload, headers)
    select 'price', symbol, 'pricing.price_quoted.v1',
           ('{{"as_of": "2026-01-01T00:00:00+00:00", "price": "1.25", "symbol": "' || symbol ||
            '", "occurred_at": "2026-01-01T00:00:00+00:00", "remark": "{remark}"}}')::jsonb,
           '{{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}}'
    from generate_series(1, {count}) n cross join lateral (select 's' || (:symbol + n) % 1000) quoted (symbol)
"""
_REMARK = "x" * 148

_COUNT = re.compile(r"transactions actually processed: (\d+)")
_RATE = re.compile(r"tps = ([0-9.]+) \(without initial")
_FAILED = re.compile(r"number of failed transactions: (\d+)")


class Written(NamedTuple):
    """Transactions committed, and how many a second; connecting does not count."""

    transactions: int
    per_second: float


def domain_only() -> str:
    return _script(_DOMAIN_ROW)


def with_event(table: str) -> str:
    return _script(_DOMAIN_ROW, _EVENT.format(table=table, remark=_REMARK))


def with_events(table: str, count: int) -> str:
    return _script(_DOMAIN_ROWS.format(count=count), _EVENTS.format(table=table, remark=_REMARK, count=count))


def _script(*statements: str) -> str:
    lines = ["begin", *(" ".join(statement.split()) for statement in statements), "commit"]
    return "\\set symbol random(0, 999)\n" + "".join(f"{line};\n" for line in lines)


def find() -> str | None:
    """Return the pgbench that comes with the server, else any; None where there is none."""
    with suppress(ServerError):
        beside = find_postgres(os.environ).path.with_name("pgbench")
        if beside.exists():
            return str(beside)
    return shutil.which("pgbench")


def write(scene: Scene, script: str, seconds: float, connections: int = 8) -> Written:
    """Write as fast as the connections can."""
    program = find()
    if program is None:
        return _with_psycopg(scene, script, seconds, connections)
    file = scene.directory / "script.sql"
    file.write_text(script)
    command = [program, "--no-vacuum", "--protocol=prepared", f"--client={connections}", "--jobs=1"]
    command += [f"--time={max(1, round(seconds))}", f"--file={file}", scene.database_url]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    count = _COUNT.search(done.stdout)
    rate = _RATE.search(done.stdout)
    failed = _FAILED.search(done.stdout)
    if done.returncode != 0 or count is None or rate is None or (failed and int(failed[1])):
        raise BenchmarkFailed(f"pgbench failed:\n{done.stdout[-500:]}\n{done.stderr[-1500:]}")
    return Written(int(count[1]), float(rate[1]))


def _with_psycopg(scene: Scene, script: str, seconds: float, connections: int) -> Written:
    statements = [line.rstrip(";") for line in script.splitlines()[1:]]
    counts: list[int] = []

    def writer(number: int) -> None:
        done, until = 0, time.monotonic() + seconds
        with psycopg.connect(scene.database_url, autocommit=True, prepare_threshold=1) as connection:
            while time.monotonic() < until:
                symbol = (number * 125 + done) % 1_000
                for statement in statements:
                    connection.execute(statement.replace(":symbol", str(symbol)).encode())
                done += 1
        counts.append(done)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Written(sum(counts), sum(counts) / seconds)
