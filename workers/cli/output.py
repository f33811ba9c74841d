"""How commands print: text for people, one JSON object for machines, one sentence for an error."""

import json
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# A pipe has no width; a table in it must not be folded.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def say(sentence: str) -> None:
    out.print(sentence, markup=False, soft_wrap=True)


def print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, default=str) + "\n")


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


def fail(sentence: str) -> NoReturn:
    """End with code 1: the work failed."""
    err.print(f"dovecote: {sentence}", markup=False, soft_wrap=True)
    raise SystemExit(1)
