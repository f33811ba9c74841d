"""The `dovecote` command. It parses, calls one verb and prints; what a verb does is written elsewhere.

Exit codes: 0 all is well; 1 the work failed or found something wrong; 2 the command or a setting is wrong.
"""

import io
import os
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, cast

import psycopg
import sqlalchemy.exc
import typer

from dovecote import masking, operations
from dovecote.cli import audit as auditing
from dovecote.cli import deliveries, events, handlers, keys, status
from dovecote.cli import doctor as doctoring
from dovecote.cli import recover as recovering
from dovecote.cli import replays as replaying
from dovecote.cli import retention as maintaining
from dovecote.cli import run as running
from dovecote.cli import settings as looking
from dovecote.cli.output import fail, note, say
from dovecote.errors import DovecoteError
from dovecote.local.binaries import ServerError
from dovecote.local.supervisor import CannotRun, ProcfileError
from dovecote.migrations import schema
from dovecote.processes.state_directory import StateDirectoryError
from dovecote.processes.terminal import refuse, write_block
from dovecote.settings import SettingsError
from dovecote.settings.application import find_app
from dovecote.telemetry.failures import is_transient, traceback_of

# What Typer raises for a wrong word; it has no public name for it.
_WRONG_COMMAND = cast(type[Exception], typer.BadParameter.__mro__[2])

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A transactional outbox.",
    epilog="Exit codes: 0 all is well; 1 the work failed or found something wrong; 2 command or setting is wrong.",
)


def _commands_of_the_application() -> list[Any]:
    try:
        return [import_module(module) for module in find_app().commands]
    except SettingsError:
        return []  # commands that need an application say so


for commands in (
    running,
    status,
    events,
    deliveries,
    handlers,
    auditing,
    replaying,
    doctoring,
    recovering,
    keys,
    looking,
    maintaining,
):
    commands.register(app)
for of_the_application in _commands_of_the_application():
    of_the_application.register(app)


def main() -> None:
    """Run the command; an error becomes one sentence, never a traceback."""
    for word in sys.argv:
        if word != (legible := word.encode(errors="replace").decode()):
            refuse(f"{legible!r} is not UTF-8")
    sys.excepthook = _unexpected
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8; stderr does so by itself
    try:
        code = app(prog_name=os.environ.get("DOVECOTE_COMMAND", "dovecote"), standalone_mode=False)
        raise SystemExit(code or 0)
    except _WRONG_COMMAND as error:
        _refuse_command(error)
    except (SettingsError, operations.WrongRequest) as error:
        refuse(str(error))
    except (DovecoteError, StateDirectoryError, ServerError, ProcfileError, CannotRun, schema.SchemaError) as error:
        fail(str(error))
    except (sqlalchemy.exc.DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        sentence = masking.masked((str(cause).strip() or type(cause).__name__).splitlines()[0], most=1_000)
        if isinstance(cause, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
            fail(f"the database has no Dovecote schema, or an old one ({sentence}): run `dovecote migrate`")
        if isinstance(cause, psycopg.errors.InsufficientPrivilege):
            fail(f"Postgres refused: {sentence}; grant this login the role that may (README, Rights)")
        fail(f"{'Postgres is not there' if is_transient(error) else 'Postgres refused'}: {sentence}")


def _refuse_command(error: Any) -> NoReturn:
    # Typer prints the words that were given as they are: they may come from data, in a script.
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        raise SystemExit(error.exit_code)  # the help has been printed
    if context is not None:
        note(context.get_usage(), before="")
        note(f"Try `{context.command_path} --help` for help.", before="")
    note(error.format_message())
    raise SystemExit(error.exit_code)


def _unexpected(_: type[BaseException], error: BaseException, __: object) -> None:
    """Print an error that is a bug of ours: it may hold anything of an event."""
    if isinstance(error, KeyboardInterrupt):
        raise SystemExit(130)
    write_block(sys.stderr, masking.masked(traceback_of(error)))


def _version(wanted: bool) -> None:
    if wanted:
        say(f"dovecote {version('dovecote')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass
