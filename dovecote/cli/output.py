"""How commands print: text for people, one JSON object for machines, one sentence for an error.

Everything goes through here and dovecote/processes/terminal.py, so that nothing from data reaches a terminal as it
is. No module prints by itself (tests/security/test_terminals.py).
"""

import json
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dovecote.errors import cut
from dovecote.processes import terminal

if TYPE_CHECKING:
    from dovecote.operations.page import Page

Item = TypeVar("Item")

# A pipe has no width; a table in it must not be folded.
_NO_WIDTH = 10_000
# Characters of the last column, however narrow the terminal: what is before it, ids above all, is never cut.
_LEAST_PROSE = 30
# A type and an id of an aggregate fit. What is longer would push the columns behind it out of sight.
_MAX_CELL = 300

out = Console(highlight=False, width=None if sys.stdout.isatty() else _NO_WIDTH)
_err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def say(sentence: str) -> None:
    """Print one line."""
    terminal.write_line(sys.stdout, sentence)


def say_block(text: str) -> None:
    """Print a text of many lines, such as a traceback, indented."""
    terminal.write_block(sys.stdout, text)


def say_nothing() -> None:
    """Print an empty line."""
    terminal.write(sys.stdout, "\n")


def note(sentence: str, before: str = "dovecote: ") -> None:
    """Print one line to stderr, beside what the command prints."""
    terminal.write_line(sys.stderr, sentence, before=before)


def document(ours: str) -> None:
    """Print a trusted text as it is."""
    terminal.write(sys.stdout, ours)


def cell(value: object, style: str = "") -> Text:
    """Return a value as plain text for a table or a screen: an error's words are no markup and no escape sequence.

    A list or tuple becomes a line for each of its items.
    """
    if isinstance(value, Text):
        return Text(terminal.plain(value.plain), value.style)
    lines = value if isinstance(value, list | tuple) else [value]
    return Text("\n".join(terminal.plain("" if line is None else str(line)) for line in lines), style)


def add_row(table: Table, *values: object) -> None:
    """Add a row of plain text; all but its last cell are cut where they are very long."""
    cells = [cell(value) for value in values]
    for one in cells[:-1]:
        if len(one) > _MAX_CELL:
            one.plain = cut(one.plain, _MAX_CELL)
    table.add_row(*cells)


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
    Console(highlight=False, width=max(out.width, width)).print(Legible(table))


def print_listing(
    items: Sequence[Item],
    columns: Mapping[str, Callable[[Item], object]],
    *,
    if_empty: str,
    right: Collection[str] = (),
) -> None:
    """Print a table with a row for each item; `columns` says what stands in each column, `right` which are numbers."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    for item in items:
        add_row(table, *(value(item) for value in columns.values()))
    print_table(table, if_empty)


def render(
    page: "Page[Item]",
    columns: Mapping[str, Callable[[Item], object]],
    *,
    name: str,
    if_empty: str,
    as_json: bool,
    right: Collection[str] = (),
    option: str = "before",
) -> None:
    """Print a page as a table or as one JSON object; `option` is what takes its cursor."""
    if as_json:
        print_json({name: [jsonable(item) for item in page.items], option: page.next})
        return
    print_listing(page.items, columns, if_empty=if_empty, right=right)
    if page.next:
        say(f"more: --{option} {page.next}")


def print_fields(fields: Mapping[str, object]) -> None:
    """Print a line for each field that has a value, its name in front."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in fields.items():
        if value not in (None, ""):
            add_row(table, name, value)
    print_table(table, "")


def jsonable(value: Any) -> Any:
    """Return what `--json` says of a result: its own `as_json`, or its fields."""
    if hasattr(value, "as_json"):
        return value.as_json()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def show(screen: RenderableType) -> None:
    """Print a screen made of `cell`s and tables of them."""
    out.print(Legible(screen))
    out.file.flush()


@contextmanager
def live_screen() -> Iterator[Live]:
    """Yield a screen that is drawn anew with each `update(Legible(...), refresh=True)`."""
    with Live(console=out, auto_refresh=False) as live:
        yield live


class Legible:
    """A renderable of which only rich's own control sequences reach the terminal, whatever is in its text."""

    def __init__(self, screen: RenderableType) -> None:
        self._screen = screen

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._screen, options):
            if segment.control:
                yield segment
            else:
                lines = [terminal.plain(line) for line in segment.text.split("\n")]
                yield Segment("\n".join(lines), segment.style)


def print_json(value: object, *, flush: bool = False) -> None:
    """Print one line of JSON, in ASCII; times as ISO 8601."""
    terminal.write(sys.stdout, json.dumps(jsonable(value), default=_as_text) + "\n", flush=flush)


def _as_text(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def shows_progress() -> bool:
    """Return whether a progress bar is visible: stderr is a terminal."""
    return _err.is_terminal


def progress_bar(as_json: bool, *columns: ProgressColumn) -> Progress:
    """Return a progress bar on stderr, which is there on a terminal only. Its descriptions are no markup."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *(columns or (TimeElapsedColumn(),)),
        console=_err,
        disable=as_json or not _err.is_terminal,
        transient=True,
    )


@contextmanager
def until_ctrl_c() -> Iterator[None]:
    """Run the block until it ends or Ctrl-C ends it; both are success."""
    # Explicit: a command that was started in the background of a script has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        yield


def fail(sentence: str) -> NoReturn:
    """End with code 1: the work failed."""
    note(sentence)
    raise SystemExit(1)
