"""A port is served by one process; the others wait for it."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dovecote.exporter.http import Page, serve
from tests.support.processes import eventually
from tests.support.scraping import get

ROOT = Path(__file__).parents[3]

SERVE = """
import os, sys
from dovecote.exporter.http import Page, serve
sys.addaudithook(lambda event, _: print(event, flush=True) if event == "socket.bind" else None)
serve("127.0.0.1", int(sys.argv[1]), {"/who": lambda: Page(200, "text/plain", str(os.getpid()).encode())})
sys.stdin.read()
"""


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def a_process_on(port: int, tries: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that serves the port, or tries to: a line in the file for each time."""
    with tries.open("wb") as file:
        command = [sys.executable, "-c", SERVE, str(port)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def who_serves(port: int) -> int:
    answer = get(port, "/who")
    return int(answer.body) if answer else 0


def test_when_the_process_that_serves_dies_another_one_takes_the_port(tmp_path: Path) -> None:
    port = a_free_port()

    with a_process_on(port, tmp_path / "one") as one:
        first = eventually(lambda: who_serves(port), 20, "somebody who serves")
        with a_process_on(port, tmp_path / "another") as another:
            eventually(lambda: (tmp_path / "another").read_text().count("bind") > 1, 20, "another who tries again")
            one.kill()
            second = eventually(lambda: who_serves(port), 20, "the other one, who serves")

    assert (first, second) == (one.pid, another.pid)


def test_an_unknown_page_is_not_found_and_one_that_breaks_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    port = a_free_port()

    def broken() -> Page:
        raise ZeroDivisionError

    serve("127.0.0.1", port, {"/": lambda: Page(200, "text/plain", b"here"), "/broken": broken})
    eventually(lambda: get(port, "/"), 10, "the page")
    found = {path: answer.status for path in ("/", "/?a=b", "/elsewhere", "/broken") if (answer := get(port, path))}

    assert found == {"/": 200, "/?a=b": 200, "/elsewhere": 404, "/broken": 500}


def test_a_client_that_goes_away_before_the_answer_is_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    port = a_free_port()
    serve("127.0.0.1", port, {"/": lambda: Page(200, "text/plain", b"x" * 10_000_000)})
    eventually(lambda: get(port, "/"), 10, "the page")

    for _ in range(10):
        with socket.create_connection(("127.0.0.1", port)) as hasty:
            hasty.sendall(b"GET / HTTP/1.0\r\n\r\n")
    eventually(lambda: get(port, "/"), 10, "the page once more")

    assert capfd.readouterr() == ("", "")
