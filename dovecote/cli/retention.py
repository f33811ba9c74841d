"""Commands that look after the weeks: partitions ahead, old weeks archived and dropped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dovecote.cli.options import Actor, DryRun
from dovecote.cli.output import AsJson, add_row, print_json, print_table, say

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dovecote.operations import retention


KeepWeeks = Annotated[
    int | None, typer.Option(min=0, max=5_200, help="Whole weeks to keep before this one; 0 drops none.")
]


def register(app: typer.Typer) -> None:
    app.command()(maintain)
    app.command()(partitions)


def maintain(
    actor: Actor,
    archive_dir: Annotated[
        Path | None, typer.Option(help="Archive each week here before it is dropped.", file_okay=False)
    ] = None,
    keep_weeks: KeepWeeks = None,
    unsubscribe: Annotated[
        str | None, typer.Option(help="First end the subscriptions of a handler that no route has any more.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make partitions ahead; archive and drop weeks older than those to keep. What is needed is never dropped.

    Personal data whose time is over is removed first: expired challenges with their encrypted numbers.
    Exit code 1 when an old week is held back: by what, and what to do, is said.

    Example: dovecote maintain --keep-weeks 12 --archive-dir /srv/archive --dry-run
    """
    from dovecote.operations import retention
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    settings = load_settings(needs_redis=False)
    with engine_during(settings) as engine:
        if unsubscribe is not None:
            ended = retention.unsubscribe_handler(
                engine, unsubscribe, by=actor, routes=find_app().routes, dry_run=dry_run
            )
            if not as_json:
                say(f"{ended} subscriptions of {unsubscribe} {'would end' if dry_run else 'ended'}")
        purged = None if dry_run else _purge(engine)
        done = retention.maintain(
            engine,
            by=actor,
            keep_weeks=settings.retention.keep_weeks if keep_weeks is None else keep_weeks,
            archive_dir=archive_dir or settings.retention.archive_path,
            weeks_ahead=settings.retention.weeks_ahead,
            dry_run=dry_run,
            routes=find_app().routes,
        )
    if as_json:
        print_json({**done.as_json(), "purged": purged})
    else:
        if purged is not None:
            say(f"{purged} rows of personal data removed: their time was over")
        elif not dry_run:
            say("no personal data was removed: this login may not; the leading relay does it once an hour")
        _tell(done)
    if done.held:
        raise typer.Exit(1)


def _purge(engine: Engine) -> int | None:
    """Return how many rows were removed; None for a login that may not remove them, which is no fault of the weeks."""
    from psycopg.errors import InsufficientPrivilege
    from sqlalchemy.exc import ProgrammingError

    from dovecote.operations.purging import purge
    from dovecote.settings.application import find_app

    try:
        return purge(engine, find_app().purges)
    except ProgrammingError as error:
        if not isinstance(error.orig, InsufficientPrivilege):
            raise
        return None


def _tell(done: retention.Maintenance) -> None:
    if not done.dry_run:
        say(f"{done.made} weeks of partitions made, {done.moved} rows moved into their weeks")
    if not done.keep_weeks:
        say("no week is dropped: give --keep-weeks, or set DOVECOTE_RETENTION__KEEP_WEEKS")
    elif not done.dropped and not done.held:
        say(f"no week is older than the {done.keep_weeks} to keep")
    for week in done.dropped:
        where = f", archived in {week.archive}" if week.archive else ""
        say(f"week {week.week} {'could be' if done.dry_run else 'is'} dropped: {week.events} events{where}")
    for held in done.held:
        say(f"week {held.week} is not dropped, it is still needed:")
        for one in held.blockers:
            say(f"  {_blocker(one)}: {one.advice}")


def _blocker(one: retention.PartitionBlocker) -> str:
    whose = f" for {one.handler}" if one.handler else ""
    return f"{one.events}{'+' if one.at_least else ''} {one.what}{whose} (first {one.example})"


def partitions(keep_weeks: KeepWeeks = None, as_json: AsJson = False) -> None:
    """Show every week: rows as Postgres estimates them, size, what holds it back; how far ahead partitions reach.

    What no handler has acted on is not seen here: `maintain --dry-run` reads the old weeks for that.

    Example: dovecote partitions --json
    """
    from dovecote.operations import retention
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    settings = load_settings(needs_redis=False)
    keep = settings.retention.keep_weeks if keep_weeks is None else keep_weeks
    with engine_during(settings) as engine:
        found = retention.partitions(engine, keep_weeks=keep, routes=find_app().routes)
    if as_json:
        print_json(found.as_json())
        return
    table = Table("week", "from", box=None, pad_edge=False)
    for column in ("events, about", "processed, about", "MB"):
        table.add_column(column, justify="right")
    table.add_column("held back by")
    for week in found.weeks:
        held = "; ".join(map(_blocker, week.blockers)) or ("nothing at a glance" if week.is_old else "")
        add_row(
            table,
            *(week.week, f"{week.starts_at:%F}", week.events, week.processed, f"{week.bytes / 1e6:.1f}"),
            held,
        )
    print_table(table, "there are no weeks")
    say(f"partitions reach {found.headroom_weeks} weeks beyond this one; {found.strays} rows in the default partitions")
    for gone in found.dropped:
        say(f"week {gone['week']} was dropped, {gone['events']} events: {gone['archive'] or 'no archive'}")
