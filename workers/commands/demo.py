"""Commands that put facts in: imports and the demonstration."""

import os
import sys
import threading
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated

import psycopg
import sqlalchemy.exc
import typer

from dovecote import operations
from dovecote.bootstrap import engine_during, refuse
from dovecote.cli.output import AsJson, note, print_json, progress_bar, say, shows_progress
from dovecote.database import sessions_for
from dovecote.local.state_directory import Home
from dovecote.local.supervisor import Stop, prefixed, stop_on_signals
from dovecote.local.system import STOP_SECONDS, local_system
from dovecote.settings import Settings, given_variables, load_settings
from workers import demo as demonstration
from workers.gateways import price_files as ingestion


class Format(Enum):
    auto = "auto"
    csv = "csv"
    jsonl = "jsonl"


def register(app: typer.Typer) -> None:
    ingest = typer.Typer(no_args_is_help=True, help="Take in data from files.")
    ingest.command("prices")(ingest_prices)
    app.add_typer(ingest, name="ingest")
    app.command()(demo)


def ingest_prices(
    file: Annotated[str, typer.Argument(help="CSV or JSON lines; - reads standard input.")],
    symbol: Annotated[str, typer.Option(help="Column or key of the symbol.")] = "symbol",
    price: Annotated[str, typer.Option(help="Column or key of the price.")] = "price",
    at: Annotated[str, typer.Option(help="Column or key of the moment, ISO 8601; UTC if it has no zone.")] = "at",
    format: Annotated[Format, typer.Option(help="auto: a first line that starts with { means jsonl.")] = Format.auto,
    per_transaction: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 500,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad row (exit code 1).")] = False,
    as_json: AsJson = False,
) -> None:
    """Take in prices; each becomes a fact. Bad rows are refused and listed, the rest goes in.

    Example: dovecote ingest prices fx.csv --symbol Country --price "Exchange rate" --at Date
    """
    columns = ingestion.Columns(symbol=symbol, price=price, at=at)
    latest = ingestion.Summary()
    settings = load_settings(needs_redis=False)
    with engine_during(settings) as engine, progress_bar(as_json) as bar:
        task = bar.add_task("rows", total=_rows_to_expect(file))

        def progress(summary: ingestion.Summary) -> None:
            nonlocal latest
            latest = summary
            bar.update(task, completed=summary.rows_read)

        try:
            with ingestion.opened(file) as source:
                summary = ingestion.ingest(
                    ingestion.prices(source, columns, format.value),
                    sessions_for(engine),
                    per_transaction=per_transaction,
                    strict=strict,
                    progress=progress,
                )
        except ingestion.NotReadable as error:
            refuse(f"{file}: {error}")
        except (sqlalchemy.exc.DBAPIError, KeyboardInterrupt):
            bar.stop()
            # The reply to the last COMMIT may be what was lost.
            note(
                f"{latest.rows_written} rows are in, up to line {latest.last_line_written}; "
                f"of the rest none is, or the next transaction of at most {per_transaction} rows"
            )
            raise
    if as_json:
        print_json(summary.as_json())
    else:
        _print_summary(summary)
    if strict and summary.refused:
        raise typer.Exit(1)


def _print_summary(summary: ingestion.Summary) -> None:
    say(
        f"{summary.rows_read} rows read, {summary.rows_written} written in {summary.transactions} "
        f"transactions, {len(summary.refused)} refused"
    )
    for refusal in summary.refused[:20]:
        say(f"  line {refusal.line}: {refusal.reason}")
    if len(summary.refused) > 20:
        say(f"  and {len(summary.refused) - 20} more; --json lists all")


def _rows_to_expect(file: str) -> int | None:
    """Return how many rows to expect, for the progress bar; None where that cannot be known."""
    if not shows_progress() or not Path(file).is_file():
        return None
    with Path(file).open("rb") as source:
        return sum(1 for _ in source)


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
        print_json(report.as_json())
    else:
        say(
            f"{report.written} written, {report.published} published, {report.processed} processed, "
            f"{report.lost} lost, {report.duplicated} duplicated, in {report.seconds} s"
        )
    if not report.is_sound:
        raise typer.Exit(1)


def _demo(settings: Settings, events: int, timeout_seconds: float, as_json: bool) -> demonstration.Report:
    with engine_during(settings) as engine, progress_bar(as_json) as bar:
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


def _is_led() -> bool:
    """Return whether there is a system to be used, with a relay at work."""
    given = given_variables(os.environ)
    if not given.get("DOVECOTE_DATABASE__URL") and Home.locate(os.environ).running() is None:
        return False
    with (
        suppress(psycopg.errors.UndefinedTable, sqlalchemy.exc.ProgrammingError),
        engine_during(load_settings()) as engine,
    ):
        return operations.status(engine, ()).relay.leading
    return False
