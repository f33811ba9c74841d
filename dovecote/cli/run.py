"""Commands that run processes: the whole system, one relay, the migration, a client that finds the system."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from dovecote.cli.options import DryRun
from dovecote.cli.output import AsJson, add_row, cell, note, print_json, say, say_nothing, show
from dovecote.cli.system import settings
from dovecote.processes.terminal import refuse

if TYPE_CHECKING:
    from dovecote.local.system import LocalSystem


def up(
    procfile: Annotated[
        Path | None, typer.Option(help="Which processes to run.", exists=True, show_default="that of the application")
    ] = None,
) -> None:
    """Run a whole system here until Ctrl-C: servers where none are given, relay, consumers.

    The application is that of DOVECOTE_APP; without one it is the built-in demo.

    Example: DOVECOTE_HOME=/var/tmp/mine dovecote up
    """
    from dovecote.local.supervisor import prefixed, stop_on_signals
    from dovecote.local.system import STOP_SECONDS, local_system
    from dovecote.settings.application import BUILT_IN_APP, app_name

    named = app_name()
    if named is None:
        say("DOVECOTE_APP names no application: this runs the built-in demo")
    with stop_on_signals() as stop, local_system(os.environ, say, named or BUILT_IN_APP, procfile) as system:
        supervisor = system.supervisor(prefixed(system.processes, sys.stdout))
        supervisor.start()
        try:
            _introduce(system)
            supervisor.run_until(stop)
        finally:
            say("stopping: processes first, then servers; the data stays")
            supervisor.stop(STOP_SECONDS)
    say("stopped")


def relay() -> None:
    """Move committed events to the queues until SIGTERM; a second one stands by.

    Example: dovecote relay
    """
    from dovecote.bootstrap import app_or_exit, run_relay

    run_relay(app_or_exit())


def migrate(
    to: Annotated[
        str, typer.Option(help="Revision to stop at; `library@head` leaves out the application's.")
    ] = "heads",
    down_to: Annotated[
        str | None,
        typer.Option(help="Take revisions back to this one; `base`: all, `application@base`: the application's."),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Bring the database's schema up to date.

    Example: DATABASE_URL=postgresql://... dovecote migrate
    """
    from dovecote.migrations import schema
    from dovecote.settings.application import app_name, load_app

    url = settings(needs_redis=False).database.url.get_secret_value()
    named = app_name()
    if named is None:
        note("DOVECOTE_APP names no application: only the revisions of the library are known")
    locations = load_app(named).migration_locations if named else ()
    if down_to is None:
        steps = schema.steps(url, to, locations=locations)
    else:
        steps = schema.steps_back(url, down_to, locations=locations)
    if not dry_run:
        (schema.upgrade if down_to is None else schema.downgrade)(url, down_to or to, locations=locations)
    if as_json:
        print_json({"dry_run": dry_run, "revisions": steps})
    elif dry_run:
        verb = "would be applied" if down_to is None else "would be undone"
        say(f"{verb}: {', '.join(steps) or 'none'}; nothing was changed")
    else:
        say("the schema is up to date" if (to, down_to) == ("heads", None) else f"schema at {down_to or to}")


def execute(command: Annotated[list[str], typer.Argument(help="Command and its arguments.")]) -> None:
    """Run a command that finds the system: DATABASE_URL, REDIS_URL and psql's PGHOST ... are set for it.

    Example: dovecote exec psql -c 'select * from outbox_events limit 5'
    """
    from dovecote.local.clients import environment_for_clients

    given = settings()
    urls = {
        "DATABASE_URL": given.database.url.get_secret_value(),
        "REDIS_URL": given.redis.url.get_secret_value(),
    }
    try:
        os.execvpe(command[0], command, environment_for_clients(urls, os.environ))  # noqa: S606 - the words are the user's own
    except FileNotFoundError:
        refuse(f"there is no command {command[0]!r} on this machine")


def _introduce(system: LocalSystem) -> None:
    show(Text.assemble(cell("Dovecote is running.", "bold"), " Ctrl-C stops it; the data stays."))
    say_nothing()
    table = Table(box=None, show_header=False, pad_edge=False)
    for variable in ("DATABASE_URL", "REDIS_URL"):
        if variable in system.servers:
            server, _ = system.servers[variable]
            add_row(table, "  " + server.name, server.address, server.origin)
        else:
            add_row(table, "  server", f"the one of {variable}", "")
    add_row(table, "  state directory", str(system.home.path), "")
    if system.servers:
        add_row(table, "  data", str(system.data), "")
    add_row(table, "  processes", ", ".join(system.processes), "")
    if system.ports:
        add_row(table, "  metrics", ", ".join(f"{name} {port}" for name, port in system.ports.items()), "")
    show(table)
    say_nothing()
    command = os.environ.get("DOVECOTE_COMMAND", "dovecote")
    shown = {"status": "how far everything is"}
    if "demo" in system.app.commands:
        shown["demo --events 1000"] = "write events and see them become effects"
    shown["exec psql"] = "look into the tables"
    for words, meaning in shown.items():
        say(f"  {command} {words:<20} {meaning}")
    say_nothing()
