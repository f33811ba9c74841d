"""`./dev bench NAME`, which is `python -m benchmarks NAME`."""

import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.harness import BenchmarkFailed, Options
from benchmarks.run import NAMES, run
from dovecote.cli.output import add_row, cell, fail, note, print_json, say, show


def bench(
    name: Annotated[
        str,
        typer.Argument(help="Which one; benchmarks/README.md describes each of them."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
    quick: Annotated[bool, typer.Option(help="A smaller run of at most 45 s.")] = False,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of each variant.")] = None,
    events: Annotated[int | None, typer.Option(min=100, help="Events of each round.")] = None,
) -> None:
    """Measure ourselves against the naive outbox and against what the machine can do, side by side.

    Example: ./dev bench relay --quick
    """
    if name not in NAMES:
        _refuse(f"there is no benchmark {name!r}; there are {', '.join(NAMES)}")
    try:
        report = run(name, Options(quick=quick, rounds=rounds, events=events, say=_say))
    except BenchmarkFailed as error:
        fail(str(error))
    if as_json:
        print_json(report.as_json())
    else:
        _show(report.as_json())


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['name']}, {report['unit']}", title_justify="left")
    for column in ("", "median", "spread", "ours is better by", "rounds"):
        table.add_column(column, justify="left" if column in ("", "rounds") else "right")
    for variant, measured in report["rounds"].items():
        times = report["ratio"].get(variant)
        add_row(
            table,
            variant,
            _number(report.get(variant)),
            f"{report['details']['spread'].get(variant, 0):.0%}",
            f"{times:.2f}" if times else "",
            "  ".join(map(_number, measured)),
        )
    show(table)
    for key, value in report["details"].items():
        if key in ("spread", "reach"):
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            show(_curve(key, value))
        else:
            say(f"{key}: {value}")
    say(f"{'reached' if report['reached'] else 'MISSED'}: {report['details']['reach']}")
    show(cell(", ".join(f"{key} {value}" for key, value in report["machine"].items()), "dim"))


def _curve(title: str, points: list[dict[str, Any]]) -> Any:
    table = Table(title=title, title_justify="left")
    for column in points[0]:
        table.add_column(column, justify="right")
    for point in points:
        add_row(table, *(str(value) if isinstance(value, bool) else _number(value) for value in point.values()))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.2f}"


def _say(sentence: str) -> None:
    if sys.stderr.isatty():
        note(sentence, before="")


def _refuse(sentence: str) -> None:
    note(sentence)
    raise SystemExit(2)


if __name__ == "__main__":
    typer.run(bench)
