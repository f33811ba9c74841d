"""A port is served by one process; the others wait for it."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import eventually
from tests.workers.telemetry.scraping import get
from workers.telemetry.serving import Page, serve

ROOT = Path(__file__).parents[3]

SERVE = """
import os, sys
from workers.telemetry.serving import Page, serve
serve("127.0.0.1", int(sys.argv[1]), {"/who": lambda: Page(200, "text/plain", str(os.getpid()).encode())})
sys.stdin.read()
"""


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def a_process_on(port: int) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], cwd=ROOT, stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def who_serves(port: int) -> str:
    answer = get(port, "/who")
    return answer.body if answer else ""


def test_when_the_process_that_serves_dies_another_one_takes_the_port() -> None:
    port = a_free_port()

    with a_process_on(port) as one, a_process_on(port) as another:
        first = eventually(lambda: who_serves(port), 20, "somebody who serves")
        serving = {str(one.pid): one, str(another.pid): another}[first]
        serving.kill()
        serving.wait()
        second = eventually(lambda: who_serves(port), 20, "the other one, who serves")

    assert {first, second} == {str(one.pid), str(another.pid)}


def test_an_unknown_page_is_not_found_and_one_that_breaks_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    port = a_free_port()

    def broken() -> Page:
        raise ZeroDivisionError

    serve("127.0.0.1", port, {"/": lambda: Page(200, "text/plain", b"here"), "/broken": broken})
    eventually(lambda: get(port, "/"), 10, "the page")
    found = {path: answer.status for path in ("/", "/?a=b", "/elsewhere", "/broken") if (answer := get(port, path))}

    assert found == {"/": 200, "/?a=b": 200, "/elsewhere": 404, "/broken": 500}


def test_whoever_goes_away_before_the_answer_is_no_news(capfd: pytest.CaptureFixture[str]) -> None:
    port = a_free_port()
    serve("127.0.0.1", port, {"/": lambda: Page(200, "text/plain", b"x" * 10_000_000)})
    eventually(lambda: get(port, "/"), 10, "the page")

    for _ in range(10):
        with socket.create_connection(("127.0.0.1", port)) as hasty:
            hasty.sendall(b"GET / HTTP/1.0\r\n\r\n")
    eventually(lambda: get(port, "/"), 10, "the page once more")

    assert capfd.readouterr() == ("", "")
