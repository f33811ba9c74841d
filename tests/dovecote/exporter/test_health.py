"""Health is asked of real servers, says what is missing and since when, and never hangs."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from dovecote.exporter.health import FRESH_SECONDS, Missing, health, require_fresh, servers
from dovecote.local.servers import Redis
from dovecote.migrations import schema
from dovecote.migrations.revisions import revisions
from dovecote.settings import Settings
from tests.conftest import settings_for
from tests.support.migrations import LOCATIONS
from tests.support.processes import a_place_for_servers, eventually
from tests.support.scraping import Answer, status_of


@pytest.fixture
def redis() -> Iterator[Redis]:
    """A Redis of this test's own, that it may stop."""
    with a_place_for_servers() as place:
        server = Redis(place / "redis")
        try:
            yield server
        finally:
            server.stop()


def ready(settings: Settings) -> Answer:
    page = health(servers(settings, LOCATIONS), "ready")()
    return Answer(page.status, page.body.decode())


def test_a_redis_that_stops_is_named_and_so_is_its_return(
    redis: Redis, fresh_database_url: str, tmp_path: Path
) -> None:
    server = redis.start()
    page = health(servers(settings_for(fresh_database_url, server.url, tmp_path), LOCATIONS), "ready")

    def report() -> Answer:
        answer = page()
        return Answer(answer.status, answer.body.decode())

    def report_with(status: int) -> Answer:
        found = eventually(lambda: now if (now := report()).status == status else None, 10, f"a report with {status}")
        assert found
        return found

    at_first = report()
    redis.stop()
    without = report_with(503)
    still_without = report()
    redis.start(server.port)
    again = report_with(200)

    assert at_first.report["status"] == again.report["status"] == "ready"
    assert (without.report["status"], without.report["missing"]) == ("not ready", ["redis"])
    assert status_of(without.report["dependencies"]) == {"postgres": "up", "schema": "up", "redis": "down"}
    gone = without.report["dependencies"]["redis"]
    assert set(gone) == {"status", "since"}
    assert at_first.report["timestamp"] < gone["since"] < again.report["dependencies"]["redis"]["since"]
    assert still_without.report["dependencies"]["redis"]["since"] == gone["since"]
    assert again.report["dependencies"]["postgres"]["since"] < gone["since"]


def test_a_server_that_takes_connections_and_is_silent_is_missing_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        settings = settings_for(f"postgresql://me:hunter2@127.0.0.1:{port}/x", f"redis://127.0.0.1:{port}/0", tmp_path)
        began = time.monotonic()
        answer = ready(settings)
        took_seconds = time.monotonic() - began

    assert took_seconds < 5
    assert answer.report["missing"] == ["postgres", "schema", "redis"]
    assert "hunter2" not in answer.body


def test_a_schema_that_is_older_than_this_code_is_missing(
    empty_database_url: str, settings: Settings, tmp_path: Path
) -> None:
    schema.upgrade(empty_database_url, revisions(locations=LOCATIONS)[-2], locations=LOCATIONS)

    with capture_logs() as logged:
        report = ready(settings_for(empty_database_url, settings.redis.url.get_secret_value(), tmp_path)).report

    assert report["missing"] == ["schema"]
    assert [revisions(locations=LOCATIONS)[-1] in line["error"] for line in logged] == [True]


def test_asked_often_a_server_is_asked_once() -> None:
    asked = []

    def check() -> str:
        asked.append(1)
        return ""

    page = health({"server": check}, "ready")
    for _ in range(50):
        page()

    assert len(asked) == 1


def test_a_check_that_hangs_is_not_begun_again() -> None:
    asked = []
    answered = threading.Event()

    def hang() -> str:
        asked.append(1)
        answered.wait(60)
        return ""

    page = health({"server": hang}, "ready")
    statuses = [page().status, page().status]
    answered.set()

    assert (statuses, len(asked)) == ([503, 503], 1)


def test_a_sign_of_life_grows_old() -> None:
    assert "0 s ago" in require_fresh("the relay", time.time())
    with pytest.raises(Missing, match="the relay"):
        require_fresh("the relay", time.time() - FRESH_SECONDS - 1)
