"""`dovecote up` with two relays and two worker processes behind one port: what they show is what Postgres knows."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from sqlalchemy import Engine, text

from domain.pricing import PriceQuoted
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
from tests.conftest import Servers
from tests.support.exact_counts import count_everything
from tests.support.metrics_catalogue import catalogue
from tests.support.processes import eventually
from tests.support.promtool import PROMTOOL, needs_promtool
from tests.support.quotes import a_quote
from tests.support.scraping import Numbers, get, scrape, scrape_until, status_of
from workers.routes import ROUTES

pytestmark = pytest.mark.timeout(180)

HANDLER = "pricing.apply_quotes"

PROCFILE = """
relay: dovecote relay
relay-2: dovecote relay
pricing: dramatiq dovecote.bootstrap:consumers --queues pricing --processes 2 --threads 2 --skip-logging
"""


@dataclass
class Watched:
    """A running system, the ports of its processes, and all that it has said."""

    process: "subprocess.Popen[bytes]"
    log: Path
    engine: Engine
    ports: dict[str, int]
    redis: redis.Redis
    namespace: str

    def relays(self) -> list[int]:
        return [self.ports["relay"], self.ports["relay-2"]]

    def leader(self) -> int:
        (port,) = [port for port in self.relays() if scrape(port)("dovecote_relay_state", state="leading")]
        return port

    def write(self, *quotes: PriceQuoted) -> None:
        with unit_of_work(sessions_for(self.engine)) as uow:
            for quote in quotes:
                uow.emit(quote)

    def forge(self) -> None:
        """Put a message on the queue that no relay has made."""
        self.redis.hset(f"{self.namespace}:pricing.msgs", "forged", "a message")
        self.redis.rpush(f"{self.namespace}:pricing", "forged")

    def until_quiet(self) -> None:
        eventually(lambda: count_everything(self.engine, ROUTES).is_quiet, 30, "a quiet system")

    def serving(self) -> psutil.Process:
        """The worker that has the port of the consumers."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            for connection in child.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr.port == self.ports["pricing"]:
                    return child
        raise AssertionError("nobody serves")


def ports_in(log: Path) -> dict[str, int]:
    line = re.search(r"^ +metrics +(.+?) *$", log.read_text(), re.MULTILINE)
    return {name: int(port) for name, port in (pair.split() for pair in line[1].split(", "))} if line else {}


def is_ready(port: int) -> bool:
    answer = get(port, "/health/ready")
    return answer is not None and answer.status == 200


@pytest.fixture(scope="module")
def watched(database_url: str, servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    home = tmp_path_factory.mktemp("home")
    (home / "Procfile").write_text(PROCFILE)
    engine = connect(database_url, pool_size=2)
    namespace = f"test-{home.name}"
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dovecote", "up", "--procfile", str(home / "Procfile")],
            env={
                **os.environ,
                "DATABASE_URL": database_url,
                "REDIS_URL": servers.redis_url,
                "DOVECOTE_APP": "workers.app:app",
                "DOVECOTE_HOME": str(home),
                "DOVECOTE_REDIS__NAMESPACE": namespace,
                "TMPDIR": str(home),
                "COLUMNS": "200",
            },
            stdout=log,
            stderr=log,
        )
    try:
        ports = eventually(partial(ports_in, home / "log"), 60, "an introduction with ports")
        client = redis.Redis.from_url(servers.redis_url)
        watched = Watched(process, home / "log", engine, ports, client, namespace)
        for port in ports.values():
            eventually(partial(is_ready, port), 60, f"health on port {port}")
        yield watched
    finally:
        process.terminate()
        process.wait(60)
        engine.dispose()


def test_the_numbers_are_those_of_postgres(watched: Watched) -> None:
    good = [a_quote(f"S{n}", n + 1) for n in range(300)]
    bad = [a_quote("bad", price=-1), a_quote("bad", price=-2)]
    watched.write(*good, *bad)
    watched.until_quiet()
    leader = scrape(watched.leader())
    consumers = scrape(watched.ports["pricing"])
    with watched.engine.connect() as connection:
        published, batches = connection.execute(
            text("select sum(events), count(*) from dovecote.published_batches")
        ).one()
        processed = connection.scalar(text("select count(*) from dovecote.processed_events"))
        dead = connection.scalar(text("select count(*) from dovecote.deliveries where state = 'dead'"))

    assert (published, processed, dead) == (302, 300, 2)
    assert leader("dovecote_published_events_total") == leader("dovecote_batch_events_sum") == published
    assert leader("dovecote_batch_events_count") == batches
    assert leader("dovecote_published_bundles_total") >= 1
    assert consumers("dovecote_processed_events_total", handler=HANDLER) == processed
    assert consumers("dovecote_commit_to_effect_seconds_count", handler=HANDLER) == processed
    assert consumers("dovecote_failed_events_total", handler=HANDLER, state="dead") == dead
    assert consumers("dovecote_bundle_events_sum", handler=HANDLER) == published
    assert consumers("dovecote_handler_duration_seconds_count", handler=HANDLER) >= 3
    assert len(consumers.by("pid", "dovecote_heartbeat_timestamp_seconds")) == 2
    for port in watched.relays():
        numbers = scrape_until(
            port,
            lambda now: now("dovecote_deliveries", handler=HANDLER, state="dead"),
            "a collection that knows the dead",
        )
        assert numbers("dovecote_deliveries", handler=HANDLER, state="dead") == dead
        assert numbers("dovecote_unprocessed_events", handler=HANDLER) == 0
        assert numbers("dovecote_lag_events") == numbers("dovecote_lag_seconds") == 0
        assert numbers("dovecote_leader_present") == 1
        assert numbers.by("server", "dovecote_up") == {"postgres": 1, "redis": 1}
        assert max(map(abs, numbers.by("server", "dovecote_clock_skew_seconds").values())) < 1
        assert 3 * 604_800 < numbers("dovecote_partition_headroom_seconds") <= 5 * 604_800


def test_of_two_relays_one_leads_and_both_report_on_the_system(watched: Watched) -> None:
    scrapes = [scrape(port) for port in watched.relays()]

    states = {state for one in scrapes for state, value in one.by("state", "dovecote_relay_state").items() if value}
    assert states == {"leading", "standing_by"}
    assert [one("dovecote_leader_present") for one in scrapes] == [1, 1]


def test_a_writer_that_wakes_the_relay_is_counted_as_a_wakeup(watched: Watched) -> None:
    leader = watched.leader()
    before = scrape(leader)("dovecote_wakeups_total")

    def wakeups() -> float:
        watched.write(a_quote())
        return scrape(leader)("dovecote_wakeups_total") - before

    eventually(wakeups, 20, "a wake-up")


def test_an_open_transaction_of_a_writer_is_an_active_writer(watched: Watched) -> None:
    port = watched.ports["relay"]
    with unit_of_work(sessions_for(watched.engine)) as uow:
        uow.emit(a_quote())
        uow.session.flush()
        uow.session.execute(text("select dovecote.append_event('a', '1', 'pricing.price_quoted.v1', '{}')"))
        held = scrape_until(port, lambda now: now("dovecote_active_writers"), "a collection with an active writer")
        uow.session.rollback()

    assert held("dovecote_oldest_writer_seconds") > 0


def test_the_catalogue_names_every_metric_its_type_and_its_labels(watched: Watched) -> None:
    watched.write(a_quote())
    watched.until_quiet()
    watched.forge()  # what nobody has met has no labels, and is not shown
    scrape_until(watched.ports["pricing"], lambda now: now.by("queue", "dovecote_refused_messages_total"), "a refusal")
    shown: dict[str, tuple[str, set[str]]] = {}

    for port in watched.ports.values():
        for name, (kind, labels) in scrape(port).catalogue().items():
            shown.setdefault(name, (kind, set()))[1].update(labels)

    assert shown == catalogue()


@needs_promtool
@pytest.mark.parametrize("process", ["relay", "pricing"])
def test_promtool_has_no_complaint(watched: Watched, process: str) -> None:
    watched.write(a_quote())
    watched.until_quiet()

    done = subprocess.run(
        [PROMTOOL, "check", "metrics"],
        input=scrape(watched.ports[process]).text,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_ready_reports_each_thing_a_process_needs(watched: Watched) -> None:
    # Ready is a master with one worker; the second may still be starting.
    port = watched.ports["pricing"]
    eventually(lambda: "2 alive" in str(get(port, "/health/ready")), 30, "two workers")
    reports = {name: answer.report for name, port in watched.ports.items() if (answer := get(port, "/health/ready"))}

    for name, report in reports.items():
        last = "workers" if name == "pricing" else "relay"
        assert report["status"] == "ready"
        assert report["missing"] == []
        assert status_of(report["dependencies"]) == dict.fromkeys(["postgres", "schema", "redis", last], "up")
        for timestamp in (report["timestamp"], *(one["since"] for one in report["dependencies"].values())):
            assert abs((datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()) < 180
    assert {reports[name]["dependencies"]["relay"]["detail"] for name in ("relay", "relay-2")} == {
        "leading",
        "standing by",
    }
    assert reports["pricing"]["dependencies"]["workers"]["detail"] == "2 alive"


def test_health_and_scrapes_leave_no_line_in_the_log(watched: Watched) -> None:
    before = watched.log.read_bytes()

    for port in watched.ports.values():
        for path in ("/health/live", "/health/ready", "/metrics"):
            answers = [get(port, path) for _ in range(34)]
            assert {answer.status for answer in answers if answer} == {200}

    assert watched.log.read_bytes() == before


def test_the_port_comes_back_when_the_worker_that_serves_it_is_killed(watched: Watched) -> None:
    port = watched.ports["pricing"]
    killed = watched.serving()

    killed.kill()

    def serves_without_it() -> Numbers | None:
        answer = get(port, "/metrics")
        numbers = Numbers(answer.body) if answer else None
        alive = numbers.by("pid", "dovecote_heartbeat_timestamp_seconds") if numbers else {}
        return numbers if len(alive) == 2 and str(killed.pid) not in alive else None

    eventually(serves_without_it, 60, "two workers, neither of them the killed one")
    assert watched.serving().pid != killed.pid


def test_a_scrape_leaves_no_connection_behind(watched: Watched) -> None:
    for port in watched.ports.values():
        get(port, "/metrics")
        get(port, "/health/ready")

    def left() -> list[str]:
        with psycopg.connect(
            watched.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        ) as connection:
            found = connection.execute(
                "select application_name from pg_stat_activity where datname = current_database()"
                " and application_name in ('dovecote metrics', 'dovecote health')"
            )
            return [name for (name,) in found]

    eventually(lambda: not left(), 10, "no connection of a scrape")
