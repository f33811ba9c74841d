"""How commands print: text for people, one JSON object for machines, one sentence for an error."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Annotated, NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# A pipe has no width; a table in it must not be folded.
_NO_WIDTH = 10_000
# Characters of the last column, however narrow the terminal: what is before it, ids above all, is never cut.
_LEAST_PROSE = 30

out = Console(highlight=False, width=None if sys.stdout.isatty() else _NO_WIDTH)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def say(sentence: str) -> None:
    out.print(sentence, markup=False, soft_wrap=True)


def add_row(table: Table, *values: object) -> None:
    """Add a row of plain text: an error's words are not markup."""
    table.add_row(
        *(value if isinstance(value, Text) else Text("" if value is None else str(value)) for value in values)
    )


def print_table(table: Table, if_empty: str) -> None:
    """Print a table; only its last column may be folded. A row too long for the terminal runs over its edge."""
    if not table.row_count:
        say(if_empty)
        return
    *whole, _ = table.columns
    width = _LEAST_PROSE
    for column in whole:
        column.no_wrap = True
        width += 1 + max(cell_len(str(cell)) for cell in (column.header, *column.cells))
    Console(highlight=False, width=max(out.width, width)).print(table)


def print_json(value: object, *, flush: bool = False) -> None:
    """Print one line of JSON; moments as ISO 8601."""
    sys.stdout.write(json.dumps(value, default=_as_text) + "\n")
    if flush:
        sys.stdout.flush()


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def progress_bar(as_json: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        disable=as_json or not err.is_terminal,
        transient=True,
    )


@contextmanager
def until_ctrl_c() -> Iterator[None]:
    """Run the block until it ends or Ctrl-C ends it, which is a good end."""
    # Explicit: a command that was started in the background of a script has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        yield


def fail(sentence: str) -> NoReturn:
    """End with code 1: the work failed."""
    err.print(f"dovecote: {sentence}", markup=False, soft_wrap=True)
    raise SystemExit(1)
