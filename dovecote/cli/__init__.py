"""The `dovecote` command. It parses, calls one verb and prints; what a verb does is written elsewhere.

Exit codes: 0 all is well; 1 the work failed or found something wrong; 2 the command or a setting is wrong.
"""

import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, cast

import typer

from dovecote.cli.commands import Commands
from dovecote.cli.output import fail, note, say
from dovecote.errors import DovecoteError
from dovecote.processes.terminal import refuse, write_block

# What Typer raises for a wrong word; it has no public name for it.
_WRONG_COMMAND = cast(type[Exception], typer.BadParameter.__mro__[2])

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A transactional outbox.",
    epilog="Exit codes: 0 all is well; 1 the work failed or found something wrong; 2 command or setting is wrong.",
)


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
    except DovecoteError as error:
        refuse(str(error), error.exit_code)
    except Exception as error:
        if sentence := _what_postgres_says(error):
            fail(sentence)
        raise


def _what_postgres_says(error: Exception) -> str | None:
    """Return an error of the database as a sentence, with what to do; None for any other error."""
    import psycopg
    import sqlalchemy.exc

    from dovecote.masking import masked
    from dovecote.telemetry.failures import is_transient

    cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    if not isinstance(error, sqlalchemy.exc.DBAPIError | psycopg.Error):
        return None
    sentence = masked((str(cause).strip() or type(cause).__name__).splitlines()[0], most=1_000)
    if isinstance(cause, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
        return f"the database has no Dovecote schema, or an old one ({sentence}): run `dovecote migrate`"
    if isinstance(cause, psycopg.errors.InsufficientPrivilege):
        return f"Postgres refused: {sentence}; grant this login the role that may (docs/operations/deployment.md)"
    return f"{'Postgres is not there' if is_transient(error) else 'Postgres refused'}: {sentence}"


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
    from dovecote.masking import masked
    from dovecote.telemetry.failures import traceback_of

    if isinstance(error, KeyboardInterrupt):
        raise SystemExit(130)
    write_block(sys.stderr, masked(traceback_of(error)))


def _version(wanted: bool) -> None:
    if wanted:
        say(f"dovecote {version('dovecote')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass
