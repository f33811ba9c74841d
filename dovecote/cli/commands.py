"""Which commands there are, and the group that imports one only when it is called, or asked for its own help.

The list of all commands needs none of them: one line of each stands here
(tests/dovecote/cli/test_commands.py holds it against the commands themselves).
"""

from collections import UserDict
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dovecote.errors import DovecoteError
from dovecote.route import Command
from dovecote.settings.application import BUILT_IN_APP, app_name, load_app

COMMANDS: Mapping[str, Command] = {
    "up": Command(
        "dovecote.cli.run:up",
        "Run a whole system here until Ctrl-C: servers where none are given, relay, consumers.",
    ),
    "relay": Command(
        "dovecote.cli.run:relay", "Move committed events to the queues until SIGTERM; a second one stands by."
    ),
    "migrate": Command("dovecote.cli.run:migrate", "Bring the database's schema up to date."),
    "exec": Command(
        "dovecote.cli.run:execute",
        "Run a command that finds the system: DATABASE_URL, REDIS_URL and psql's PGHOST ... are set for it.",
        passes_options=True,
    ),
    "status": Command(
        "dovecote.cli.status:status",
        "Show how far the relay is and how each handler stands. With --watch --json: one object a line.",
    ),
    "events": Command("dovecote.cli.events:events", "Look at events."),
    "deliveries": Command("dovecote.cli.deliveries:deliveries", "Look at failed deliveries; retry or discard them."),
    "aggregates": Command("dovecote.cli.aggregates:aggregates", "Look at blocked aggregates."),
    "handlers": Command("dovecote.cli.handlers:handlers", "Handlers: list them, pause and resume them."),
    "audit": Command("dovecote.cli.audit:audit", "Show who did what, why and to how much, newest first."),
    "replay": Command("dovecote.cli.replays:replay", "Send events to a handler again."),
    "doctor": Command(
        "dovecote.cli.doctor:doctor",
        "Test both servers, the relay, the queues and the schema, and say what to do. Exit code 1 on an error.",
    ),
    "recover": Command(
        "dovecote.cli.recover:recover",
        "Repair the sequence of positions, and have the relay send what it has not seen. Harmless where all is well.",
    ),
    "keys": Command("dovecote.cli.keys:keys", "The keys that messages are signed with."),
    "settings": Command("dovecote.cli.settings:settings", "Print every option with its default, unit and meaning."),
    "maintain": Command(
        "dovecote.cli.retention:maintain",
        "Make partitions ahead; archive and drop weeks older than those to keep. "
        "What is still needed is never dropped.",
    ),
    "partitions": Command(
        "dovecote.cli.retention:partitions",
        "Show every week: rows as Postgres estimates them, size, what holds it back; how far ahead partitions reach.",
    ),
}


class Commands(TyperGroup):
    """The commands of Dovecote and of the application. A command is imported when it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**{**attributes, "commands": None})
        self.commands = _Loaded()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the name and one line of a command, for the list of all."""
        found = described(cmd_name)
        return TyperCommand(cmd_name, help=found.help) if found else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is called."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, self.commands[name] if found and name else found, rest


def described(name: str) -> Command | None:
    """Return a command's entry; None for an unknown name."""
    return COMMANDS.get(name) or _of_the_application().get(name)


def load(name: str, command: Command) -> Any:
    """Import a command."""
    module, _, attribute = command.target.partition(":")
    target = getattr(import_module(module), attribute)
    app = typer.Typer(add_completion=False)
    if isinstance(target, typer.Typer):
        app.add_typer(target, name=name)
    else:
        app.command(name, context_settings={"ignore_unknown_options": command.passes_options})(target)
        app.callback()(lambda: None)  # with it the app is a group, of one command
    return typer.main.get_group(app).commands[name]


class _Loaded(UserDict[str, Any]):
    """The commands by name; one is imported when it is taken out."""

    def __getitem__(self, name: str) -> Any:
        if name not in self.data:
            found = described(name)
            if found is None:
                raise KeyError(name)
            self.data[name] = load(name, found)
        return self.data[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**COMMANDS, **_of_the_application()})

    def __len__(self) -> int:
        return len({**COMMANDS, **_of_the_application()})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and described(name) is not None


def _of_the_application() -> Mapping[str, Command]:
    try:
        return (load_app(app_name() or BUILT_IN_APP)).commands
    except DovecoteError:
        return {}  # commands that need an application say so
