"""Attack: a stranger holds connections of the port of metrics, reads errors there, or takes the place of its files."""

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import values
from structlog.testing import capture_logs

from dovecote.exporter import http as serving
from dovecote.exporter.health import health, servers
from dovecote.exporter.http import MAX_CONNECTIONS, MAX_REQUEST_BYTES, Page, serve
from dovecote.exporter.metrics import shared_directory
from tests.conftest import settings_for
from tests.support.processes import eventually
from tests.support.scraping import get

ROOT = Path(__file__).parents[2]
LARGE = b"x" * 20_000_000
OPEN_SLOWLY = threading.Event()


def slow() -> Page:
    OPEN_SLOWLY.wait(20)
    return Page(200, "text/plain", b"slow")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    pages = {"/": lambda: Page(200, "text/plain", b"here"), "/large": lambda: Page(200, "text/plain", LARGE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "DEADLINE_SECONDS", 1.5)
        serve("127.0.0.1", free, {**pages, "/slow": slow})
        eventually(lambda: get(free, "/"), 10, "the page")
        yield free


def connected(port: int, says: bytes = b"") -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", port), timeout=5)
    stream.sendall(says)
    return stream


def is_closed(stream: socket.socket) -> bool:
    try:
        stream.setblocking(False)
        return stream.recv(65_536) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def answer_to(port: int, said: bytes) -> bytes:
    with connected(port, said) as stream:
        heard = b""
        while chunk := stream.recv(65_536):
            heard += chunk
    return heard


@pytest.mark.alone
@pytest.mark.parametrize("said", [b"", b"GET /", b"GET / HTTP/1.1\r\nX: "], ids=["nothing", "half a line", "a header"])
def test_hundreds_who_dawdle_take_no_thread_and_a_scrape_is_answered(
    port: int, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "DEADLINE_SECONDS", 60)  # what sends them away is their number
    threads = threading.active_count()
    with ExitStack() as held:
        dawdling = [held.enter_context(connected(port, said)) for _ in range(3 * MAX_CONNECTIONS)]
        began = time.monotonic()
        answer = get(port, "/")
        took_seconds = time.monotonic() - began

        assert answer
        assert answer.body == "here"
        assert took_seconds < 1
        assert threading.active_count() <= threads + 1
        eventually(lambda: sum(map(is_closed, dawdling)) >= 2 * MAX_CONNECTIONS, 5, "the oldest are sent away")


def test_a_byte_now_and_then_does_not_keep_a_connection(port: int) -> None:
    began = time.monotonic()
    with connected(port, b"GET / HTTP/1.1\r\nX: ") as trickling:

        def is_sent_away() -> bool:
            try:
                trickling.sendall(b"a")
            except OSError:
                return True
            return is_closed(trickling)

        eventually(is_sent_away, 10, "the deadline")
    assert time.monotonic() - began < 5


def test_who_does_not_read_the_answer_is_sent_away_too(port: int) -> None:
    with ExitStack() as held:
        not_reading = [held.enter_context(connected(port, b"GET /large HTTP/1.1\r\n\r\n")) for _ in range(20)]
        answer = get(port, "/")
        assert answer
        assert answer.body == "here"

        def all_end() -> bool:
            return all(len(drained(stream)) < len(LARGE) for stream in not_reading)

        time.sleep(2)  # the deadline itself: reading earlier would be listening
        assert all_end()


def drained(stream: socket.socket) -> bytes:
    heard = b""
    try:
        while chunk := stream.recv(1_000_000):
            heard += chunk
    except OSError:
        pass
    return heard


def test_those_who_wait_for_one_page_hold_up_no_other_and_share_its_making(port: int) -> None:
    threads = threading.active_count()
    OPEN_SLOWLY.clear()
    with ExitStack() as held:
        waiting = [held.enter_context(connected(port, b"GET /slow HTTP/1.1\r\n\r\n")) for _ in range(50)]
        answer = get(port, "/")

        assert answer
        assert answer.body == "here"
        assert threading.active_count() <= threads + 2
        OPEN_SLOWLY.set()
        assert all(drained(stream).endswith(b"slow") for stream in waiting)


SAID = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"HTTP/1.1 400 "),
    "an old version": (b"GET /\r\n\r\n", b"HTTP/1.1 400 "),
    "another method": (b"POST / HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 "),
    "an unknown method": (b"BREW / HTTP/1.1\r\n\r\n", b"HTTP/1.1 405 "),
    "an unknown page": (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 "),
    "bare line feeds": (b"GET / HTTP/1.0\n\n", b"HTTP/1.1 200 "),
    "a line without an end": (b"GET /" + b"a" * (MAX_REQUEST_BYTES + 1), b"HTTP/1.1 431 "),
    "headers without an end": (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * (MAX_REQUEST_BYTES // 6), b"HTTP/1.1 431 "),
}


@pytest.mark.parametrize(("said", "answer"), SAID.values(), ids=SAID)
def test_whatever_is_said_has_a_short_answer(port: int, said: bytes, answer: bytes) -> None:
    heard = answer_to(port, said)

    assert heard.startswith(answer)
    assert len(heard) < 300
    assert b"Connection: close" in heard


def test_a_head_is_a_get_without_the_page(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("HEAD", "/large")
    answer = connection.getresponse()

    assert (answer.status, answer.getheader("Content-Length"), answer.read()) == (200, str(len(LARGE)), b"")


def test_health_shows_strangers_no_server_login_or_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as refusing:
        nobody = refusing.getsockname()[1]
    settings = settings_for(
        f"postgresql://a_login:hunter2@127.0.0.1:{nobody}/a_database",
        f"redis://:hunter2@127.0.0.1:{nobody}/0",
        tmp_path,
    )
    page = health(servers(settings, ()), "ready")
    with capture_logs() as logged:
        bodies = [page().body.decode() for _ in range(3)]

    for body in bodies:
        assert '"missing":["postgres","schema","redis"]' in body
        assert not [word for word in ("127.0.0.1", str(nobody), "a_login", "a_database", "refused") if word in body]
    assert {line["what"] for line in logged} == {"postgres", "schema", "redis"}
    assert len(logged) == 3, "it is logged once, however often strangers ask"
    assert str(nobody) in str(logged)


CONSUMERS = "dramatiq dovecote.bootstrap:consumers --path --queues pricing --processes 1 --threads 1"


def test_a_place_for_metrics_that_somebody_has_taken_costs_metrics_and_no_consumer(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Anybody may write here, and move away what is ours: a place that cannot be had.
    tmp_path.chmod(0o777)
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*CONSUMERS.split(), "--worker-shutdown-timeout", "100"],
            env={
                "PATH": os.environ["PATH"],
                "DOVECOTE_APP": "workers.app:app",
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(tmp_path),
                "DOVECOTE_HOME": str(tmp_path / "home"),
                "DATABASE_URL": "postgresql://x@127.0.0.1:1/x",
                "REDIS_URL": "redis://127.0.0.1:1/0",
                "DOVECOTE_TELEMETRY__HTTP_PORT": str(port),
            },
            cwd="/",
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        live = eventually(lambda: get(port, "/health/live"), 60, "somebody who answers")
        metrics = get(port, "/metrics")
        eventually(lambda: "metrics have no place" in log.read_text(), 60, "a log line about the place")
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, at once
        process.wait()

    assert live
    assert live.status == 200
    assert metrics
    assert metrics.status == 200


def test_nobody_can_guess_where_metrics_will_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")

    ours = shared_directory("postgresql://u:a password@db/x")

    assert shared_directory("postgresql://u:a password@db/x") == ours
    assert shared_directory("postgresql://u:another@db/x") != ours
