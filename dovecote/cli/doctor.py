"""The command that finds out what is wrong."""

import typer
from rich.table import Table

from dovecote.cli.output import AsJson, add_row, cell, print_json, print_table

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: AsJson = False) -> None:
    """Test both servers, the relay, the queues and the schema, and say what to do. Exit code 1 on an error.

    Example: dovecote doctor --json
    """
    from dovecote.operations import doctor as doctoring
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app

    found = doctoring.examine(load_settings(), find_app().routes)
    if as_json:
        print_json(found.as_json())
    else:
        table = Table("", "check", "found", box=None, pad_edge=False)
        for finding in found.findings:
            colour = _COLOURS[finding.level]
            add_row(table, cell(finding.level, colour), finding.check, finding.found)
            if finding.advice:
                add_row(table, "", "", cell(finding.advice, colour))
        print_table(table, "nothing was examined")
    if found.has_errors:
        raise typer.Exit(1)
