"""Draw terminal pictures of a real system: what `dovecote status` and others print, as SVG. Renewed by `./dev docs`.

The system runs in a state directory of its own and is stopped at the end. Some of its events fail on purpose.
"""

import fcntl
import io
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psycopg
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PICTURES = DOCS / "pictures"

#: The words of each picture, and the columns of its terminal.
COMMANDS: dict[str, tuple[list[str], int]] = {
    "status": (["status"], 130),
    "deliveries": (["deliveries", "list"], 184),
    "doctor": (["doctor"], 112),
}

_START_SECONDS = 60.0
# rich's own template names fonts on a server of others: a picture must not ask the network for anything.
_TEMPLATE = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)

_PAYMENT = """
select dovecote.append_event('membership', %(id)s, 'billing.payment_recorded.v1', jsonb_build_object(
    'membership_id', %(id)s::text, 'user_id', 'user-1', 'amount', jsonb_build_object(
        'amount_minor', %(amount)s::jsonb, 'currency', 'EUR'),
    'invoice_id', 'in_1', 'description', 'Membership', 'occurred_at', now()))
"""
_QUOTE = """
select dovecote.append_event('price', 'Australia', 'pricing.price_quoted.v1', jsonb_build_object(
    'symbol', 'Australia', 'price', %(price)s::text, 'as_of', now(), 'occurred_at', now()))
"""


def draw_all() -> list[Path]:
    """Run a system, and draw what each command prints."""
    PICTURES.mkdir(exist_ok=True)
    drawn = []
    with _system() as environment:
        _run(["demo", "--events", "5000"], environment)
        _let_events_fail(environment)
        for name, (words, columns) in COMMANDS.items():
            path = PICTURES / f"{name}.svg"
            printed = _output(words, environment, columns)
            path.write_text(_svg(f"dovecote {' '.join(words)}", printed, columns), encoding="utf-8")
            drawn.append(path)
    return drawn


@contextmanager
def _system() -> Iterator[Mapping[str, str]]:
    """Run `dovecote up` in a state directory of its own."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="dovecote-docs-") as place:
        Path(place).chmod(0o711)  # root's servers run as another user
        kept = ("PATH", "LANG", "LC_ALL", "USER", "DOVECOTE_POSTGRES_BIN", "DOVECOTE_REDIS_BIN")
        environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "DOVECOTE_APP": "workers.app:app",
            "DOVECOTE_HOME": f"{place}/state",
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
        }
        up = subprocess.Popen(
            [sys.executable, "-P", "-m", "dovecote", "up"],
            env=environment,
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert up.stdout is not None
            for line in up.stdout:
                if "relay leads" in line:
                    break
            else:
                raise RuntimeError("`dovecote up` ended before a relay led")
            # What it prints from now on must not fill the pipe.
            subprocess.Popen(["cat"], stdin=up.stdout, stdout=subprocess.DEVNULL)
            yield environment
        finally:
            up.send_signal(signal.SIGINT)
            up.wait(60)


def _let_events_fail(environment: Mapping[str, str]) -> None:
    url = _run(["exec", sys.executable, "-c", "import os; print(os.environ['DATABASE_URL'])"], environment).strip()
    with psycopg.connect(url, autocommit=True) as connection:
        for number in range(3):
            # The second one of each membership is well-formed, and waits behind the first.
            for amount in ('"12.50"', "1250"):
                connection.execute(_PAYMENT, {"id": f"00000000-0000-7000-8000-00000000000{number}", "amount": amount})
        for price in ("0,89", "n/a"):
            connection.execute(_QUOTE, {"price": price})
        until = time.monotonic() + _START_SECONDS
        failed = "select count(*) filter (where state = 'dead') = 5 from dovecote.deliveries"
        while connection.execute(failed).fetchone() != (True,):
            if time.monotonic() > until:
                raise RuntimeError("the events did not fail")
            time.sleep(0.1)  # a look at the table: nothing announces that a delivery is dead


def _run(words: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dovecote", *words],
        env=dict(environment),
        cwd=environment["DOVECOTE_HOME"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"dovecote {' '.join(words)} ended with {done.returncode}: {done.stdout}")
    return done.stdout


def _output(words: list[str], environment: Mapping[str, str], columns: int) -> str:
    """Return what the command prints on a terminal, colours included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "dovecote", *words],
        env=dict(environment),
        cwd=environment["DOVECOTE_HOME"],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    printed = b""
    try:
        while chunk := os.read(ours, 65_536):
            printed += chunk
    except OSError:
        pass  # the other end is closed: the command has ended
    finally:
        os.close(ours)
    if process.wait() not in (0, 1):
        raise RuntimeError(f"dovecote {' '.join(words)} ended with {process.returncode}")
    return printed.decode().replace("\r\n", "\n").replace(socket.gethostname(), "host")


def _svg(title: str, printed: str, columns: int) -> str:
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "bold green"), title))
    console.print(Text.from_ansi(printed.rstrip("\n")))
    return console.export_svg(title=title, theme=SVG_EXPORT_THEME, code_format=_TEMPLATE, unique_id="dovecote")
