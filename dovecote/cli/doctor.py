"""`dovecote doctor`: find out what is wrong."""

from __future__ import annotations

import typer
from rich.table import Table

from dovecote import operations
from dovecote.cli.output import AsJson, add_row, cell, print_json, print_table
from dovecote.cli.system import settings
from dovecote.settings.application import find_app

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(as_json: AsJson = False) -> None:
    """Test both servers, the relay, the queues and the schema, and say what to do. Exit code 1 on an error.

    Example: dovecote doctor --json
    """
    app = find_app()
    found = operations.doctor.examine(settings(), app.routes, migration_locations=app.migration_locations)
    if as_json:
        print_json(found)
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
