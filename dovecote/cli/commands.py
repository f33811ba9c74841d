"""The commands by name. A command's module is imported when the command is used, so that help comes at once."""

import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from dovecote.processes.state_directory import StateDirectory


class Entry(NamedTuple):
    """Where a command is, and the line about it in the help of all; a test holds it against the command's own."""

    module: str
    help: str


COMMANDS = {
    "up": Entry("run", "Run a whole system here until Ctrl-C: servers where none are given, relay, consumers."),
    "relay": Entry("run", "Move committed events to the queues until SIGTERM; a second one stands by."),
    "migrate": Entry("run", "Bring the database's schema up to date."),
    "exec": Entry(
        "run", "Run a command that finds the system: DATABASE_URL, REDIS_URL and psql's PGHOST ... are set for it."
    ),
    "status": Entry(
        "status", "Show how far the relay is and how each handler stands. With --watch --json: one object a line."
    ),
    "events": Entry("events", "Look at events."),
    "deliveries": Entry("deliveries", "Look at what did not go well; retry it or give it up."),
    "aggregates": Entry("deliveries", "Look at aggregates that stand still."),
    "handlers": Entry("handlers", "Handlers: look at them, pause and resume them."),
    "audit": Entry("audit", "Show who did what, why and to how much, newest first."),
    "replay": Entry("replays", "Send events to a handler again."),
    "doctor": Entry(
        "doctor",
        "Test both servers, the relay, the queues and the schema, and say what to do. Exit code 1 on an error.",
    ),
    "recover": Entry(
        "recover",
        "Repair the sequence of positions, and have the relay send what it has not seen. Harmless where all is well.",
    ),
    "keys": Entry("keys", "The keys that messages are signed with."),
    "settings": Entry("settings", "Print every option with its default, unit and meaning."),
    "maintain": Entry(
        "retention",
        "Make partitions ahead; archive and drop weeks older than those to keep. What is needed is never dropped.",
    ),
    "partitions": Entry(
        "retention",
        "Show every week: rows as Postgres estimates them, size, what holds it back; how far ahead partitions reach.",
    ),
}


class Commands(TyperGroup):
    """The library's commands from the table, and behind them those of the application."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *_of_the_application()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # For a list: nothing is imported for a line of help.
        if entry := COMMANDS.get(cmd_name):
            return TyperCommand(cmd_name, help=entry.help)
        return _of_the_application().get(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if entry := COMMANDS.get(args[0]):
            return args[0], _registered_by(f"{__package__}.{entry.module}")[args[0]], args[1:]
        return super().resolve_command(ctx, args)


def _of_the_application() -> dict[str, Any]:
    if (
        "DOVECOTE_APP" not in os.environ
        and not Path(".env").exists()
        and not StateDirectory.locate(os.environ).running()
    ):
        return {}  # nothing names one: no need to import what reads settings
    from dovecote.settings import SettingsError
    from dovecote.settings.application import find_app

    try:
        modules = find_app().commands
    except SettingsError:
        return {}  # commands that need an application say so
    return {name: command for module in modules for name, command in _registered_by(module).items()}


def _registered_by(module: str) -> dict[str, Any]:
    parser = typer.Typer()
    parser.callback()(_nothing)  # one command alone would not stay a group
    import_module(module).register(parser)
    return dict(typer.main.get_group(parser).commands)


def _nothing() -> None:
    pass
