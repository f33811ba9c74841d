"""`dovecote ingest`: take in data from files."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovecote.cli.output import AsJson, note, print_json, progress_bar, say, shows_progress
from dovecote.processes.terminal import refuse

if TYPE_CHECKING:
    from workers.gateways import price_files as ingestion


class Format(Enum):
    auto = "auto"
    csv = "csv"
    jsonl = "jsonl"


ingest = typer.Typer(no_args_is_help=True, help="Take in data from files.")


@ingest.command("prices")
def ingest_prices(
    file: Annotated[str, typer.Argument(help="CSV or JSON lines; - reads standard input.")],
    symbol: Annotated[str, typer.Option(help="Column or key of the symbol.")] = "symbol",
    price: Annotated[str, typer.Option(help="Column or key of the price.")] = "price",
    at: Annotated[str, typer.Option(help="Column or key of the time, ISO 8601; UTC if it has no zone.")] = "at",
    format: Annotated[Format, typer.Option(help="auto: a first line that starts with { means jsonl.")] = Format.auto,
    per_transaction: Annotated[int, typer.Option(min=1, max=100_000, help="Rows in one transaction.")] = 500,
    strict: Annotated[bool, typer.Option(help="Stop at the first bad row (exit code 1).")] = False,
    as_json: AsJson = False,
) -> None:
    """Take in prices; each becomes an event. Bad rows are refused and listed, the rest goes in.

    Example: dovecote ingest prices fx.csv --symbol Country --price "Exchange rate" --at Date
    """
    import sqlalchemy.exc

    from dovecote.settings import load_settings
    from dovecote.store.connections import sessions_for
    from dovecote.store.engines import engine_during
    from workers.gateways import price_files as ingestion

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
        print_json(summary)
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
