"""Run the processes of a Procfile as direct children, and start again what ends.

One thread waits for everything at once: output, ends of children, the wish to stop. Each child
leads a session of its own, so a Ctrl-C reaches only us, and we stop them in order. It gets SIGTERM
when we end without a word; its own children have to ask for that themselves (`die_with_parent`).
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dovecote.errors import DovecoteError
from dovecote.processes.children import die_with_parent, dying_with_us
from dovecote.processes.stop_flag import StopFlag
from dovecote.processes.terminal import write_line

__all__ = [
    "CannotRun",
    "ProcfileError",
    "Supervisor",
    "die_with_parent",
    "parse_procfile",
    "prefixed",
    "stop_on_signals",
]

Output = Callable[[str, str], None]

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0
# A child that lived this long was well: its next end is a new trouble, not the old one.
_WELL_AFTER_SECONDS = 30.0
# A line longer than this is passed on in pieces, so that no child can fill our memory.
_LONGEST_LINE_BYTES = 65_536
_LINE = re.compile(r"\s*([A-Za-z0-9_-]+)\s*:\s*(\S.*)")
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)


class ProcfileError(DovecoteError, ValueError):
    """A line of the Procfile says nothing we understand."""

    def __init__(self, number: int, trouble: str) -> None:
        super().__init__(f"Procfile, line {number}: {trouble}")
        self.number = number


class CannotRun(DovecoteError):
    """A command of the Procfile cannot even be started."""


def parse_procfile(text: str) -> dict[str, list[str]]:
    """Return name and words of each `name: command` line; blank lines and # comments are skipped."""
    processes: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ProcfileError(number, f"expected 'name: command', got {line.strip()!r}")
        name, command = match.groups()
        if name in processes:
            raise ProcfileError(number, f"a second process named {name!r}")
        try:
            processes[name] = shlex.split(command)
        except ValueError as error:
            raise ProcfileError(number, f"{error} in {command!r}") from error
    return processes


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Set a stop flag on SIGINT, SIGTERM and SIGHUP; restore the former handlers at the end.

    Background jobs of a script inherit SIGINT ignored; it is handled here all the same. An ignored SIGHUP stays
    ignored: that is what nohup means.
    """
    stop = StopFlag()
    heard = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        heard.append(signal.SIGHUP)
    before = {sig: signal.signal(sig, lambda number, _: stop.set(number)) for sig in heard}
    try:
        yield stop
    finally:
        for sig, handler in before.items():
            signal.signal(sig, signal.SIG_DFL if handler is None else handler)
        stop.close()


class Supervisor:
    """Keeps the given processes running until it is asked to stop. Used from the main thread only."""

    def __init__(
        self,
        processes: Mapping[str, Sequence[str]],
        environment: Mapping[str, str],
        output: Output,
        own: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """`environment` is for all; `own` is what some get besides, by their names."""
        self._output = output
        self._selector = selectors.DefaultSelector()
        # Safe path: no child imports from the directory that we were started in. It stays theirs, for what the settings
        # say relative to it.
        python = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        here = {**environment, **python, "PATH": _our_path(environment)}
        self._children = [
            _Child(name, list(command), {**here, **(own or {}).get(name, {})}, self._selector, output)
            for name, command in processes.items()
        ]

    def start(self) -> None:
        """Start all; CannotRun, and none is left, if one of them has no program."""
        for child in self._children:
            try:
                child.start()
            except OSError as error:
                self.stop()
                raise CannotRun(f"{child.name}: cannot run {child.command[0]!r}: {error.strerror}") from error

    def watch(self, pid: int, ended: Callable[[], None]) -> None:
        """Call `ended` from `run_until` when a process that is not of the Procfile ends."""
        pidfd = os.pidfd_open(pid)

        def notify() -> None:
            self._selector.unregister(pidfd)
            os.close(pidfd)
            ended()

        self._selector.register(pidfd, selectors.EVENT_READ, notify)

    def run_until(self, stop: StopFlag) -> None:
        """Pass on output and start again what ends, until `stop`."""
        self._selector.register(stop, selectors.EVENT_READ, lambda: None)
        try:
            while not stop.is_set():
                self._restart_what_is_due()
                self._turn(self._seconds_to_next_restart())
        finally:
            self._selector.unregister(stop)

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Ask all to end at once, wait for them, and kill whatever of their groups is left."""
        for child in self._children:
            child.ask_to_end()
        deadline = time.monotonic() + timeout_seconds
        while any(child.is_alive for child in self._children) and time.monotonic() < deadline:
            self._turn(deadline - time.monotonic())
        for child in self._children:
            if child.is_alive:
                self._output(child.name, f"still there after {timeout_seconds:g} s: killed")
            child.bury()
            child.restart_at = None

    def _turn(self, timeout_seconds: float | None) -> None:
        for key, _ in self._selector.select(timeout_seconds):
            key.data()

    def _seconds_to_next_restart(self) -> float | None:
        due = [child.restart_at for child in self._children if child.restart_at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _restart_what_is_due(self) -> None:
        for child in self._children:
            if child.restart_at is not None and child.restart_at <= time.monotonic():
                child.restart()


class _Child:
    """One line of the Procfile, through all its lives."""

    def __init__(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        selector: selectors.BaseSelector,
        output: Output,
    ) -> None:
        self.name = name
        self.command = command
        self.is_alive = False
        self.restart_at: float | None = None
        self._was_asked_to_end = False
        self._environment = environment
        self._selector = selector
        self._output = output
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = self._pipe = -1
        self._rest = b""
        self._started_at = 0.0
        self._pause_seconds = _FIRST_PAUSE_SECONDS

    def start(self) -> None:
        reads, writes = os.pipe2(os.O_CLOEXEC)
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=writes,
                stderr=writes,
                env=self._environment,
                start_new_session=True,
                preexec_fn=dying_with_us(signal.SIGTERM),
            )
        except BaseException:
            os.close(reads)
            raise
        finally:
            os.close(writes)
        os.set_blocking(reads, False)
        self._pipe = reads
        self._pidfd = os.pidfd_open(self._process.pid)
        self._selector.register(self._pipe, selectors.EVENT_READ, self._read)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._ended)
        self._started_at = time.monotonic()
        self.is_alive = True
        self._was_asked_to_end = False

    def restart(self) -> None:
        self.bury()
        self.restart_at = None
        try:
            self.start()
        except OSError as error:
            self._plan_restart(f"cannot be started ({error.strerror})")

    def ask_to_end(self) -> None:
        # Only the leader: Dramatiq's master passes it on, and takes a second one as "at once".
        if self._process is not None and self.is_alive:
            self._was_asked_to_end = True
            os.kill(self._process.pid, signal.SIGTERM)  # Popen's own way may reap it

    def bury(self) -> None:
        """Kill what is left of its group, and only then reap the leader.

        Until it is reaped, its pid, which is the group's id too, is given to nobody else.
        """
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        self.is_alive = False
        self._close_pidfd()
        self._read()
        self._close_pipe()

    def _ended(self) -> None:
        """Note the end and leave the zombie; its own children have the pause to finish."""
        assert self._process is not None
        self.is_alive = False
        self._close_pidfd()
        self._read()
        if self._was_asked_to_end:
            return
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self._plan_restart(_described(status) if status else "ended")

    def _plan_restart(self, what_happened: str) -> None:
        now = time.monotonic()
        if now - self._started_at >= _WELL_AFTER_SECONDS:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        self.restart_at = now + self._pause_seconds
        self._output(self.name, f"{what_happened}; starting it again in {self._pause_seconds:g} s")
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _read(self) -> None:
        """Pass on all that is there."""
        while self._pipe >= 0:
            try:
                chunk = os.read(self._pipe, _LONGEST_LINE_BYTES)
            except BlockingIOError:
                return
            if not chunk:
                self._close_pipe()
                return
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                self._say(line)
            if len(self._rest) >= _LONGEST_LINE_BYTES:
                self._say_rest()

    def _say(self, line: bytes) -> None:
        self._output(self.name, line.decode(errors="replace").rstrip("\r"))

    def _say_rest(self) -> None:
        rest, self._rest = self._rest, b""
        if rest:
            self._say(rest)

    def _close_pipe(self) -> None:
        if self._pipe >= 0:
            self._selector.unregister(self._pipe)
            os.close(self._pipe)
            self._pipe = -1
        self._say_rest()

    def _close_pidfd(self) -> None:
        if self._pidfd >= 0:
            self._selector.unregister(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def prefixed(names: Iterable[str], stream: TextIO) -> Output:
    """Return an `output` that writes `name | line`, names padded, coloured on a terminal.

    A line is a child's own, and what it prints of events is others': escape sequences in it are shown, not obeyed.
    """
    known = list(names)
    width = max(map(len, known), default=0)
    coloured = stream.isatty() and not os.environ.get("NO_COLOR")

    def write(name: str, line: str) -> None:
        prefix = f"{name:<{width}} |"
        if coloured:
            colour = _COLOURS[known.index(name) % len(_COLOURS)] if name in known else 90
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        write_line(stream, line, before=f"{prefix} ")

    return write


def _our_path(environment: Mapping[str, str]) -> str:
    """Let `python`, `dramatiq` and `dovecote` mean those beside this interpreter."""
    ours = str(Path(sys.executable).parent)
    return f"{ours}{os.pathsep}{environment.get('PATH', os.defpath)}"


def _described(status: os.waitid_result) -> str:
    if status.si_code == os.CLD_EXITED:
        return f"ended with exit status {status.si_status}"
    return f"ended by {signal.Signals(status.si_status).name}"
