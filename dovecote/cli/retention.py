"""Commands for weekly partitions: make them ahead, archive and drop old ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dovecote import operations
from dovecote.cli.options import Actor, DryRun
from dovecote.cli.output import AsJson, jsonable, print_json, print_listing, say
from dovecote.cli.system import database, routes, settings
from dovecote.settings.application import find_app

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dovecote.operations.retention import Maintenance, PartitionBlocker

KeepWeeks = Annotated[
    int | None, typer.Option(min=0, max=5_200, help="Whole weeks to keep before this one; 0 drops none.")
]


def maintain(
    actor: Actor,
    archive_dir: Annotated[
        Path | None, typer.Option(help="Archive each week here before it is dropped.", file_okay=False)
    ] = None,
    keep_weeks: KeepWeeks = None,
    unsubscribe: Annotated[
        str | None,
        typer.Option(help="First end the subscriptions of a handler that no route has any more.", metavar="NAME"),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make partitions ahead; archive and drop weeks older than those to keep. What is still needed is never dropped.

    Personal data whose time is over is removed first: expired challenges with their encrypted numbers.
    Exit code 1 when an old week is held back: by what, and what to do, is said.

    Example: dovecote maintain --keep-weeks 12 --archive-dir /srv/archive --dry-run
    """
    given = settings(needs_redis=False)
    with database(given) as engine:
        if unsubscribe is not None:
            ended = operations.retention.unsubscribe_handler(
                engine, unsubscribe, actor=actor, routes=routes(), dry_run=dry_run
            )
            if not as_json:
                say(f"{ended} subscriptions of {unsubscribe} {'would end' if dry_run else 'ended'}")
        purged = None if dry_run else _purge(engine)
        done = operations.retention.maintain(
            engine,
            actor=actor,
            keep_weeks=given.retention.keep_weeks if keep_weeks is None else keep_weeks,
            archive_dir=archive_dir or given.retention.archive_path,
            weeks_ahead=given.retention.weeks_ahead,
            dry_run=dry_run,
            routes=routes(),
        )
    if as_json:
        print_json({**jsonable(done), "purged": purged})
    else:
        if purged is not None:
            say(f"{purged} rows of personal data removed: their time was over")
        elif not dry_run:
            say("no personal data was removed: this login may not; the leading relay does it once an hour")
        _report(done)
    if done.held:
        raise typer.Exit(1)


def _purge(engine: Engine) -> int | None:
    """Return how many rows were removed; None where the login may not. Partitions are maintained all the same."""
    from psycopg.errors import InsufficientPrivilege
    from sqlalchemy.exc import ProgrammingError

    from dovecote.operations.purging import purge

    try:
        return purge(engine, find_app().purges)
    except ProgrammingError as error:
        if not isinstance(error.orig, InsufficientPrivilege):
            raise
        return None


def _report(done: Maintenance) -> None:
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


def _blocker(one: PartitionBlocker) -> str:
    whose = f" for {one.handler}" if one.handler else ""
    return f"{one.events}{'+' if one.at_least else ''} {one.what}{whose} (first {one.example})"


def partitions(keep_weeks: KeepWeeks = None, as_json: AsJson = False) -> None:
    """Show every week: rows as Postgres estimates them, size, what holds it back; how far ahead partitions reach.

    What no handler has acted on is not seen here: `maintain --dry-run` reads the old weeks for that.

    Example: dovecote partitions --json
    """
    given = settings(needs_redis=False)
    keep = given.retention.keep_weeks if keep_weeks is None else keep_weeks
    with database(given) as engine:
        found = operations.retention.list_partitions(engine, keep_weeks=keep, routes=routes())
    if as_json:
        print_json(found)
        return
    print_listing(
        found.weeks,
        {
            "week": lambda week: week.week,
            "from": lambda week: f"{week.starts_at:%F}",
            "events, about": lambda week: week.events,
            "processed, about": lambda week: week.processed,
            "MB": lambda week: f"{week.bytes / 1e6:.1f}",
            "held back by": lambda week: (
                "; ".join(map(_blocker, week.blockers)) or ("nothing at a glance" if week.is_old else "")
            ),
        },
        right=("events, about", "processed, about", "MB"),
        if_empty="there are no weeks",
    )
    say(
        f"partitions reach {found.headroom_weeks} weeks beyond this one; "
        f"{found.misplaced_rows} rows in the default partitions"
    )
    for gone in found.dropped:
        say(f"week {gone['week']} was dropped, {gone['events']} events: {gone['archive'] or 'no archive'}")
