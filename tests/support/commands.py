"""`dovecote` commands in processes of their own, each a fork of one that has imported everything already.

A fresh Python takes a second to import `workers`; a fork of one that has done so starts in hundredths. It is a real
process all the same: its own environment, directory, streams and exit code. What Python itself does at a start
is not in it: tests of signals, pipes and terminals start a fresh one.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).parents[2]

# A request and its three streams are one message; answers are the number of the process, then how it ended.
_MAX_BYTES = 100_000
_one_at_a_time = Lock()


def run(
    words: list[str], environment: Mapping[str, str], cwd: Path, stdin: bytes = b"", timeout_seconds: float = 100
) -> subprocess.CompletedProcess[bytes]:
    """Run `dovecote WORDS` to its end.

    Errors:  subprocess.TimeoutExpired; the process is killed then.
    """
    request = json.dumps([words, dict(environment), str(cwd)]).encode()
    with (
        _one_at_a_time,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin)
        given.seek(0)
        ready = _ready()
        ready.settimeout(timeout_seconds)
        socket.send_fds(ready, [request], [given.fileno(), out.fileno(), err.fileno()])
        pid = int(ready.recv(_MAX_BYTES))
        try:
            code = int(ready.recv(_MAX_BYTES))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            ready.settimeout(None)
            ready.recv(_MAX_BYTES)
            raise subprocess.TimeoutExpired(words, timeout_seconds) from None
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), err.read())


def run_text(words: list[str], environment: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """As `run`, with what it printed as text."""
    done = run(words, environment, cwd)
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@cache
def _ready() -> socket.socket:
    """Start what forks; it ends with us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, "-m", "tests.support.commands", str(theirs.fileno())],
        # No more than a command is given: what a Python reads at its start must not come from the tests' own.
        env={"PATH": os.environ["PATH"], "DOVECOTE_APP": "workers.app:app", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return ours


def _become_a_command(connection: socket.socket) -> bool:
    """Fork for every request; return True in the fork, where everything is as the request says."""
    while True:
        request, streams, _, _ = socket.recv_fds(connection, _MAX_BYTES, 3)
        if not request:
            return False
        if pid := os.fork():
            for stream in streams:
                os.close(stream)
            connection.send(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        words, environment, cwd = json.loads(request)
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["dovecote", *words]
        return True


if __name__ == "__main__":
    from dovecote import cli

    # What the first command would import: of its parser, and of help.
    with suppress(SystemExit):
        cli.app(["--help"])
    gc.freeze()  # nothing that all of them share is looked at again at an end
    if _become_a_command(socket.socket(fileno=int(sys.argv[1]))):
        cli.main()
