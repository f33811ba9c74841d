"""The runner of the Procfile, with small shell processes in place of ours."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from dovecote.local.supervisor import (
    CannotRun,
    ProcfileError,
    Supervisor,
    parse_procfile,
    prefixed,
    stop_on_signals,
)
from dovecote.processes.stop_flag import StopFlag
from tests.support.processes import are_there, eventually

CHECKOUT = Path(__file__).parents[3]

# `sleep` in the background and `wait` in front: the shell hears SIGTERM at once.
# It says "ready" last: a signal before the trap would end it without a word.
POLITE = "sleep 1000 & trap 'kill $!; echo bye; exit' TERM; echo ready $$; wait"
STUBBORN = "trap '' TERM; echo ready $$; while :; do sleep 1; done"

MASTER = """
import os, signal, time
from dovecote.local.supervisor import die_with_parent
master = os.getpid()
print("ready", master, flush=True)
if os.fork() == 0:
    die_with_parent(signal.SIGTERM, master)
    print("ready", os.getpid(), flush=True)
time.sleep(1000)
"""

RUNNER = """
import os, sys
from dovecote.local.supervisor import Supervisor, parse_procfile, prefixed, stop_on_signals
processes = parse_procfile(sys.argv[1])
with stop_on_signals() as stop:
    supervisor = Supervisor(processes, os.environ, prefixed(processes, sys.stdout))
    supervisor.start()
    supervisor.run_until(stop)
    supervisor.stop()
    print("stopped by", stop.signal.name, flush=True)
"""


class Heard:
    """An output that remembers, and acts on what it hears as a person would."""

    def __init__(self, react: Callable[[str, str], None] = lambda _name, _line: None) -> None:
        self.lines: list[tuple[str, str]] = []
        self._react = react

    def __call__(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self._react(name, line)

    def pids(self) -> list[int]:
        return [int(line.split()[1]) for _, line in self.lines if line.startswith("ready ")]


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


@contextmanager
def a_stop() -> Iterator[StopFlag]:
    stop = StopFlag()
    try:
        yield stop
    finally:
        stop.close()


def run_until(enough: Callable[[Heard], bool], processes: dict[str, list[str]]) -> tuple[Supervisor, Heard]:
    """Run until `enough` holds of what was heard; the processes still live then."""
    with a_stop() as stop:
        heard = Heard(lambda _name, _line: stop.set() if enough(heard) else None)
        supervisor = Supervisor(processes, os.environ, heard)
        supervisor.start()
        supervisor.run_until(stop)
    return supervisor, heard


def test_a_procfile_names_processes_and_their_words() -> None:
    text = "# who runs\n\nrelay: dovecote relay\nsms:  dramatiq 'dovecote.bootstrap:sms' -Q sms\n"

    assert parse_procfile(text) == {
        "relay": ["dovecote", "relay"],
        "sms": ["dramatiq", "dovecote.bootstrap:sms", "-Q", "sms"],
    }


@pytest.mark.parametrize("line", ["no colon here", "empty:", "a b: echo", "quote: echo 'open", "relay: again"])
def test_a_line_that_says_nothing_is_named_by_its_number(line: str) -> None:
    with pytest.raises(ProcfileError, match="Procfile, line 3: ") as refused:
        parse_procfile(f"relay: dovecote relay\n\n{line}\n")

    assert refused.value.number == 3


def test_a_killed_child_is_started_again() -> None:
    def kill_the_first(name: str, line: str) -> None:
        if len(heard.pids()) == 1 and line.startswith("ready"):
            os.kill(heard.pids()[0], signal.SIGKILL)
        if len(heard.pids()) == 2:
            stop.set()

    with a_stop() as stop:
        heard = Heard(kill_the_first)
        supervisor = Supervisor({"relay": shell(POLITE)}, os.environ, heard)
        supervisor.start()
        supervisor.run_until(stop)
        supervisor.stop()

    assert ("relay", "ended by SIGKILL; starting it again in 0.5 s") in heard.lines
    assert len(set(heard.pids())) == 2


def test_the_pause_before_a_restart_grows() -> None:
    def three_ends(heard: Heard) -> bool:
        return len(heard.lines) == 3

    supervisor, heard = run_until(three_ends, {"relay": shell("exit 3")})
    supervisor.stop()

    assert heard.lines == [
        ("relay", f"ended with exit status 3; starting it again in {pause} s") for pause in ("0.5", "1", "2")
    ]


def test_the_last_words_of_a_child_are_heard() -> None:
    supervisor, heard = run_until(lambda heard: len(heard.lines) == 3, {"relay": shell("echo one; printf two; exit 1")})
    supervisor.stop()

    assert [line for _, line in heard.lines] == [
        "one",
        "two",
        "ended with exit status 1; starting it again in 0.5 s",
    ]


def test_stopping_ends_all_of_them_the_stubborn_too() -> None:
    supervisor, heard = run_until(
        lambda heard: len(heard.pids()) == 2, {"polite": shell(POLITE), "stubborn": shell(STUBBORN)}
    )
    family = [child.pid for pid in heard.pids() for child in psutil.Process(pid).children()]

    supervisor.stop(timeout_seconds=0.3)

    assert ("polite", "bye") in heard.lines
    assert ("stubborn", "still there after 0.3 s: killed") in heard.lines
    assert not are_there(heard.pids())
    eventually(lambda: not are_there(family), 2, "their own children are gone")


def test_a_command_that_does_not_exist_is_said_at_once_and_starts_nothing() -> None:
    supervisor = Supervisor(
        {"polite": shell(POLITE), "relay": ["no-such-program"]}, os.environ, lambda _name, _line: None
    )

    before = psutil.Process().children()

    with pytest.raises(CannotRun, match="relay: cannot run 'no-such-program'"):
        supervisor.start()

    assert psutil.Process().children() == before


def test_python_means_the_one_we_run_on() -> None:
    program = "import sys; print(sys.prefix)"
    supervisor, heard = run_until(lambda heard: bool(heard.lines), {"which": ["python", "-c", program]})
    supervisor.stop()

    assert heard.lines[0] == ("which", sys.prefix)


def test_a_child_imports_nothing_from_where_we_stand() -> None:
    command = [sys.executable, "-c", "import sys; print('everything' if '' in sys.path else 'nothing')"]

    _, heard = run_until(lambda heard: bool(heard.lines), {"python": command})

    assert ("python", "nothing") in heard.lines


def test_output_is_prefixed_with_the_name_and_only_a_terminal_gets_colours() -> None:
    page = io.StringIO()
    write = prefixed(["relay", "consumers"], page)

    write("relay", "1 event")
    write("consumers", "done")

    assert page.getvalue() == "relay     | 1 event\nconsumers | done\n"


def test_a_supervisor_killed_outright_leaves_no_child() -> None:
    with a_runner(POLITE) as (runner, pid):
        runner.kill()

        eventually(lambda: not are_there([pid]), 5, "the child is gone")


def test_the_workers_of_a_killed_child_end_too_if_they_asked_for_it() -> None:
    supervisor, heard = run_until(lambda heard: len(heard.pids()) == 2, {"dramatiq": [sys.executable, "-c", MASTER]})
    master, worker = heard.pids()
    os.kill(master, signal.SIGKILL)

    # Nobody kills the group before stop(): the worker goes by its own wish.
    eventually(lambda: not are_there([worker]), 5, "the worker is gone")
    supervisor.stop()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_it_in_order(sig: signal.Signals) -> None:
    with a_runner(POLITE) as (runner, pid):
        runner.send_signal(sig)
        said, _ = runner.communicate()

    assert said == f"relay | bye\nstopped by {sig.name}\n"
    assert not are_there([pid])


def test_a_background_job_that_inherits_sigint_ignored_stops_on_it() -> None:
    with a_runner(POLITE, ignoring=signal.SIGINT) as (runner, _):
        runner.send_signal(signal.SIGINT)
        said, _ = runner.communicate()

    assert said.endswith("stopped by SIGINT\n")


def test_nohup_is_respected() -> None:
    with a_runner(POLITE, ignoring=signal.SIGHUP) as (runner, _):
        runner.send_signal(signal.SIGHUP)
        runner.send_signal(signal.SIGTERM)
        said, _ = runner.communicate()

    assert said.endswith("stopped by SIGTERM\n")


def test_handlers_are_put_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)

    with stop_on_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        assert stop.signal is signal.SIGTERM

    assert signal.getsignal(signal.SIGTERM) is before


def test_children_are_started_from_the_main_thread_only() -> None:
    supervisor = Supervisor({"relay": shell(POLITE)}, os.environ, lambda _name, _line: None)
    refused: list[str] = []

    def start() -> None:
        try:
            supervisor.start()
        except RuntimeError as error:
            refused.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

    assert "main thread" in refused[0]


@contextmanager
def a_runner(script: str, ignoring: signal.Signals | None = None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run one process under a supervisor of its own process; yield that and the child's pid."""
    before = signal.signal(ignoring, signal.SIG_IGN) if ignoring else None
    procfile = f"relay: /bin/sh -c {shlex.quote(script)}"
    command = [sys.executable, "-c", RUNNER, procfile]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as runner:
        if ignoring:
            signal.signal(ignoring, before)
        assert runner.stdout is not None
        try:
            yield runner, int(runner.stdout.readline().split()[-1])
        finally:
            with suppress(ProcessLookupError):
                runner.terminate()
