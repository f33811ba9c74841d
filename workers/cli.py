"""The `dovecote` command. It parses, calls one verb and prints; what a verb does is written elsewhere.

Exit codes: 0 all is well; 1 the work failed or found something wrong; 2 the command or a setting is wrong.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import psycopg
import sqlalchemy.exc
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from domain.database import sessions_for
from domain.errors import DovecoteError
from workers import demo as demonstration
from workers import ingest as ingestion
from workers import operations, schema, telemetry
from workers.binaries import ServerError
from workers.bootstrap import engine_for, refuse, relay_for, settings_or_exit
from workers.home import Home, HomeError
from workers.local import PROCFILE, STOP_SECONDS, LocalSystem, environment_for_clients, local_system
from workers.outages import passes
from workers.routes import ROUTES
from workers.settings import Settings, SettingsError, given_variables, load_settings, options, shown
from workers.supervisor import CannotRun, ProcfileError, Stop, prefixed, stop_on_signals

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="A transactional outbox.")
ingest_app = typer.Typer(no_args_is_help=True, help="Take in data from files.")
app.add_typer(ingest_app, name="ingest")

# A pipe has no width; a table in it must not be folded.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


def main() -> None:
    """Run the command; an error becomes one sentence, never a traceback."""
    try:
        app()
    except SettingsError as error:
        refuse(str(error))
    except (DovecoteError, HomeError, ServerError, ProcfileError, CannotRun, schema.SchemaError) as error:
        _fail(str(error))
    except (sqlalchemy.exc.DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        sentence = telemetry.masked(str(cause).strip().splitlines()[0])
        if isinstance(cause, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
            _fail(f"the database has no Dovecote schema, or an old one ({sentence}): run `dovecote migrate`")
        _fail(f"{'Postgres is not there' if passes(error) else 'Postgres refused'}: {sentence}")


def _fail(sentence: str) -> None:
    err.print(f"dovecote: {sentence}", markup=False, soft_wrap=True)
    raise SystemExit(1)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"dovecote {version('dovecote')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


# Running -----------------------------------------------------------------------------------------


@app.command()
def up(
    procfile: Annotated[Path, typer.Option(help="Which processes to run.", exists=True)] = PROCFILE,
) -> None:
    """Run a whole system here until Ctrl-C: servers where none are given, relay, consumers.

    Example: DOVECOTE_HOME=/var/tmp/mine dovecote up
    """
    with stop_on_signals() as stop, local_system(os.environ, _say, procfile) as system:
        supervisor = system.supervisor(prefixed(system.processes, sys.stdout))
        supervisor.start()
        try:
            _introduce(system)
            supervisor.run_until(stop)
        finally:
            _say("stopping: processes first, then servers; the data stays")
            supervisor.stop(STOP_SECONDS)
    _say("stopped")


@app.command()
def relay() -> None:
    """Move committed events to the queues until SIGTERM; a second one stands by.

    Example: dovecote relay
    """
    settings = settings_or_exit()
    telemetry.configure(settings.telemetry, "relay")
    running = relay_for(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop())
    running.run()


@app.command()
def migrate(
    to: Annotated[str, typer.Option(help="Revision to stop at.")] = "head",
    down_to: Annotated[
        str | None, typer.Option(help="Take revisions back down to this one; `base` takes back all.")
    ] = None,
) -> None:
    """Bring the database's schema up to date.

    Example: DATABASE_URL=postgresql://... dovecote migrate
    """
    url = load_settings(needs_redis=False).database.url.get_secret_value()
    if down_to is None:
        schema.upgrade(url, to)
    else:
        schema.downgrade(url, down_to)
    out.print("the schema is up to date" if (to, down_to) == ("head", None) else f"schema at {down_to or to}")


@app.command(name="exec", context_settings={"ignore_unknown_options": True})
def execute(command: Annotated[list[str], typer.Argument(help="Command and its arguments.")]) -> None:
    """Run a command that finds the system: DATABASE_URL, REDIS_URL and psql's PGHOST ... are set for it.

    Example: dovecote exec psql -c 'select * from outbox_events limit 5'
    """
    settings = load_settings()
    variables = {
        "DATABASE_URL": settings.database.url.get_secret_value(),
        "REDIS_URL": settings.redis.url.get_secret_value(),
    }
    try:
        os.execvpe(command[0], command, environment_for_clients(variables))  # noqa: S606
    except FileNotFoundError:
        refuse(f"there is no command {command[0]!r} on this machine")


# Looking -----------------------------------------------------------------------------------------


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show how far the relay is and how each handler stands.

    Example: dovecote status --json
    """
    with _engine(load_settings(needs_redis=False)) as engine:
        found = operations.status(engine, ROUTES)
    if as_json:
        _print_json(found.as_json())
        return
    relay = found.relay
    leader = f"led by {relay.owner}" if relay.leading else "nobody leads"
    out.print(
        f"relay    {leader}; {relay.lag_events} events behind, {relay.lag_seconds:.1f} s; {relay.published} published"
    )
    table = Table("handler", box=None, pad_edge=False)
    for column in ("processed", "unprocessed", "retrying", "waiting", "dead", "oldest unprocessed"):
        table.add_column(column, justify="right")
    for name, handler in found.handlers.items():
        table.add_row(
            name,
            str(handler.processed),
            str(handler.unprocessed),
            str(handler.retrying),
            str(handler.waiting),
            str(handler.dead),
            f"{handler.oldest_unprocessed_seconds:.1f} s" if handler.unprocessed else "",
        )
    out.print(table)


@app.command(name="settings")
def show_settings(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option(help="As the README's table.")] = False,
    in_force: Annotated[bool, typer.Option(help="The values in force, secrets masked.")] = False,
) -> None:
    """Print every option with its default, unit and meaning.

    Example: dovecote settings --in-force
    """
    if in_force:
        values = shown(load_settings())
        if as_json:
            _print_json(values)
        else:
            for section, fields in values.items():
                for name, value in fields.items():
                    out.print(f"{section}.{name} = {value}", markup=False, soft_wrap=True)
        return
    if as_json:
        _print_json(list(options()))
    elif markdown:
        sys.stdout.write(settings_table())
    else:
        table = Table("variable", "default", "unit", "meaning", box=None, pad_edge=False)
        for option in options():
            table.add_row(option["variable"], option["default"], option["unit"], option["meaning"])
        out.print(table)


def settings_table() -> str:
    """Return the options as a Markdown table; the README holds a copy that a test keeps true."""
    lines = ["| variable | default | unit | meaning |", "| --- | --- | --- | --- |"]
    for option in options():
        unit = option["unit"].replace("|", "or")
        lines.append(f"| `{option['variable']}` | {option['default']} | {unit} | {option['meaning']} |")
    return "\n".join(lines) + "\n"


# Working -----------------------------------------------------------------------------------------


@ingest_app.command("prices")
def ingest_prices(
    file: Annotated[str, typer.Argument(help="CSV or JSON lines; - reads standard input.")],
    symbol: Annotated[str, typer.Option(help="Column or key of the symbol.")] = "symbol",
    price: Annotated[str, typer.Option(help="Column or key of the price.")] = "price",
    at: Annotated[str, typer.Option(help="Column or key of the moment, ISO 8601; UTC if it has no zone.")] = "at",
    format: Annotated[str, typer.Option(help="csv or jsonl; by default the file's ending tells, - is jsonl.")] = "auto",
    per_transaction: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 500,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad row (exit code 1).")] = False,
    as_json: AsJson = False,
) -> None:
    """Take in prices; each becomes a fact. Bad rows are refused and listed, the rest goes in.

    Example: dovecote ingest prices fx.csv --symbol Country --price "Exchange rate" --at Date
    """
    kind = _format(file, format)
    columns = ingestion.Columns(symbol=symbol, price=price, at=at)
    with _source(file) as source, _engine(load_settings(needs_redis=False)) as engine, _progress(as_json) as bar:
        task = bar.add_task("rows", total=_lines(file))
        read = ingestion.csv_lines if kind == "csv" else ingestion.json_lines
        latest = ingestion.Summary()

        def progress(summary: ingestion.Summary) -> None:
            nonlocal latest
            latest = summary
            bar.update(task, completed=summary.rows_read)

        try:
            summary = ingestion.ingest(
                read(source, columns),
                sessions_for(engine),
                per_transaction=per_transaction,
                strict=strict,
                progress=progress,
            )
        except ingestion.NotReadable as error:
            refuse(f"{file}: {error}")
        except sqlalchemy.exc.DBAPIError:
            bar.stop()
            err.print(
                f"dovecote: {latest.rows_written} rows are in, up to line {latest.last_line_written}; "
                "none of the rest is"
            )
            raise
    if as_json:
        _print_json(summary.as_json())
    else:
        out.print(
            f"{summary.rows_read} rows read, {summary.rows_written} written in {summary.transactions} "
            f"transactions, {len(summary.refused)} refused"
        )
        for refusal in summary.refused[:20]:
            out.print(f"  line {refusal.line}: {refusal.reason}", markup=False, soft_wrap=True)
        if len(summary.refused) > 20:
            out.print(f"  and {len(summary.refused) - 20} more; --json lists all")
    if strict and summary.refused:
        raise typer.Exit(1)


@app.command()
def demo(
    events: Annotated[int, typer.Option(min=1, max=10_000_000, help="How many facts.")] = 1_000,
    timeout_seconds: Annotated[float, typer.Option(min=1, help="How long to wait for the last effect.")] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Write mixed facts of the three domains and wait until every one is an effect, once.

    Uses the running system, or runs one of its own meanwhile. Exit code 1 if a fact is lost or doubled.

    Example: dovecote demo --events 10000
    """
    if _is_led():
        report = _demo(load_settings(), events, timeout_seconds, as_json)
    else:
        report = _demo_in_own_system(events, timeout_seconds, as_json)
    if as_json:
        _print_json(report.as_json())
    else:
        out.print(
            f"{report.written} written, {report.published} published, {report.processed} processed, "
            f"{report.lost} lost, {report.duplicated} duplicated, in {report.seconds} s"
        )
    if not report.is_sound:
        raise typer.Exit(1)


def _demo(settings: Settings, events: int, timeout_seconds: float, as_json: bool) -> demonstration.Report:
    with _engine(settings) as engine, _progress(as_json) as bar:
        written_task = bar.add_task("written", total=events)
        processed_task = bar.add_task("processed", total=events)

        def progress(written: int, processed: int) -> None:
            bar.update(written_task, completed=written)
            bar.update(processed_task, completed=processed)

        return demonstration.run(engine, settings.keyring(), events, timeout_seconds=timeout_seconds, progress=progress)


def _demo_in_own_system(events: int, timeout_seconds: float, as_json: bool) -> demonstration.Report:
    """Supervise from the main thread, as children must be, and write from another."""
    outcome: list[demonstration.Report | BaseException] = []

    def write(settings: Settings, done: Stop) -> None:
        try:
            outcome.append(_demo(settings, events, timeout_seconds, as_json))
        except BaseException as error:  # handed to the main thread
            outcome.append(error)
        finally:
            done.set()

    with stop_on_signals() as stop, local_system(os.environ, lambda _: None) as system:
        settings = load_settings(system.environment)
        supervisor = system.supervisor(prefixed(system.processes, sys.stderr))
        supervisor.start()
        try:
            writer = threading.Thread(target=write, args=(settings, stop), daemon=True)
            writer.start()
            supervisor.run_until(stop)
        finally:
            supervisor.stop(STOP_SECONDS)
    if not outcome:
        raise SystemExit(1)  # a signal ended it
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


# Shared ------------------------------------------------------------------------------------------


def _is_led() -> bool:
    """Return whether there is a system to be used, with a relay at work."""
    given = given_variables(os.environ)
    if not given.get("DOVECOTE_DATABASE__URL") and Home.locate(os.environ).running() is None:
        return False
    with (
        suppress(psycopg.errors.UndefinedTable, sqlalchemy.exc.ProgrammingError),
        _engine(load_settings()) as engine,
    ):
        return operations.status(engine, ()).relay.leading
    return False


@contextmanager
def _engine(settings: Settings) -> "Iterator[Any]":
    engine = engine_for(settings, "dovecote cli")
    try:
        yield engine
    finally:
        engine.dispose()


def _say(sentence: str) -> None:
    out.print(sentence, markup=False, soft_wrap=True)


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, default=str) + "\n")


def _progress(as_json: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        disable=as_json or not err.is_terminal,
        transient=True,
    )


def _format(file: str, format: str) -> str:
    if format in ("csv", "jsonl"):
        return format
    if format != "auto":
        refuse(f"--format is {format!r}, but it wants csv or jsonl")
    return "jsonl" if file == "-" or file.endswith((".jsonl", ".ndjson", ".json")) else "csv"


@contextmanager
def _source(file: str) -> Iterator[Any]:
    # Bytes that are not UTF-8 survive as surrogates, so that one bad row does not end the file.
    if file == "-":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")  # type: ignore[union-attr]
        yield sys.stdin
        return
    if not Path(file).is_file():
        refuse(f"cannot read {file}: there is no such file")
    with Path(file).open(encoding="utf-8", errors="surrogateescape", newline="") as source:
        yield source


def _lines(file: str) -> int | None:
    """Return how many rows to expect, for the progress bar; None where that cannot be known."""
    if file == "-" or not err.is_terminal:
        return None
    with Path(file).open("rb") as source:
        return sum(1 for _ in source)


def _introduce(system: LocalSystem) -> None:
    out.print("[bold]Dovecote is running.[/bold] Ctrl-C stops it; the data stays.\n")
    table = Table(box=None, show_header=False, pad_edge=False)
    for server, variable in ((system.postgres, "DATABASE_URL"), (system.redis, "REDIS_URL")):
        if server is None:
            table.add_row("  server", f"the one of {variable}", "")
        else:
            table.add_row("  " + server.name, server.address, f"{server.origin}")
    table.add_row("  data", str(system.home.path), "")
    table.add_row("  processes", ", ".join(system.processes), "")
    out.print(table)
    out.print(
        "\n  dovecote status              how far everything is\n"
        "  dovecote demo --events 1000  write facts and see them become effects\n"
        "  dovecote exec psql           look into the tables\n",
        markup=False,
    )
