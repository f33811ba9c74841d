"""Commands about events: `events list`, `events show`, `events tail`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dovecote.cli.options import AggregateId, AggregateType, EventType, Limit, Since, Until, identifier
from dovecote.cli.output import AsJson, add_row, print_json, print_table, say, say_nothing, until_ctrl_c

if TYPE_CHECKING:
    from dovecote.operations import EventLife


_TAIL_SECONDS = 0.2


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    events = typer.Typer(no_args_is_help=True, help="Look at events.")
    for name, command in (("list", list_), ("show", show), ("tail", tail)):
        events.command(name)(command)
    app.add_typer(events, name="events")


def list_(
    event_type: EventType = None,
    aggregate_type: AggregateType = None,
    aggregate_id: AggregateId = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 50,
    before: Annotated[str | None, typer.Option(help="Only events older than this one.")] = None,
    after: Annotated[str | None, typer.Option(help="The next events newer than this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show events, newest first, and how each stands with its handlers.

    A page looks at 20,000 rows at most; where a rare type needs more, it says how far back it looked.

    Example: dovecote events list --type billing.payment_recorded.v1 --since 2h
    """
    from dovecote import operations
    from dovecote.operations import EventFilter
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    wanted = EventFilter(
        event_type=event_type,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        since=since,
        until=until,
    )
    cursors = {"before": identifier(before) if before else None, "after": identifier(after) if after else None}
    with engine_during(load_settings(needs_redis=False)) as engine:
        page = operations.events(engine, find_app().routes, wanted, limit=limit, **cursors)
    if as_json:
        print_json(page.as_json())
        return
    table = Table("event", "written", "type", "aggregate", "handlers", box=None, pad_edge=False)
    for one in page.events:
        add_row(
            table,
            one.id,
            f"{one.created_at:%F %T}",
            one.event_type,
            f"{one.aggregate_type} {one.aggregate_id}",
            ", ".join(f"{handler} {state}" for handler, state in one.handlers.items()) or "nobody wants it",
        )
    print_table(table, "no events")
    if page.looked_back_to:
        say(
            f"looked as far as {page.looked_back_to:%F %T %Z}; --{'after' if after else 'before'} "
            f"{page.after if after else page.before} to go on"
        )
    elif page.before and not after:
        say(f"more: --before {page.before}")


def show(event_id: Annotated[str, typer.Argument(help="The event's id.")], as_json: AsJson = False) -> None:
    """Show one event's whole life: written, published, and what each handler did with it.

    Example: dovecote events show 019a...
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        life = operations.event(engine, find_app().routes, identifier(event_id))
    if as_json:
        print_json(life.as_json())
    else:
        _show_life(life)


def _show_life(life: EventLife) -> None:
    facts = Table(box=None, show_header=False, pad_edge=False)
    published = (
        f"{life.published_at:%F %T.%f %Z}, in a batch of {life.batch_events}, epoch {life.epoch}"
        if life.published_at
        else "not yet"
    )
    for name, value in (
        ("event", f"{life.id}, position {life.position}"),
        ("type", life.event_type),
        ("aggregate", f"{life.aggregate_type} {life.aggregate_id}"),
        ("written", f"{life.created_at:%F %T.%f %Z}"),
        ("published", published),
        ("payload", json.dumps(life.payload, ensure_ascii=False)),
        ("headers", json.dumps(life.headers, ensure_ascii=False)),
    ):
        add_row(facts, name, value)
    print_table(facts, "")
    say_nothing()
    table = Table(
        "handler", "state", "processed", "attempts", "next", "replay", "trace", "error", box=None, pad_edge=False
    )
    for one in life.handlers:
        add_row(
            table,
            one.handler,
            one.state,
            f"{one.processed_at:%F %T.%f}" if one.processed_at else "",
            one.attempts or "",
            f"{one.next_attempt_at:%F %T}" if one.next_attempt_at else "",
            one.replay_id,
            one.trace_id,
            one.summary,
        )
    print_table(table, "nobody wants it")


def tail(
    event_type: EventType = None,
    aggregate_type: AggregateType = None,
    as_json: AsJson = False,
) -> None:
    """Show events as they commit, until Ctrl-C. With --json: one object a line.

    An event whose transaction takes long comes late, not never; those at work when this began may be missing.

    Example: dovecote events tail --type pricing.price_quoted.v1
    """
    from dovecote import operations
    from dovecote.settings import load_settings

    url = load_settings(needs_redis=False).database.url.get_secret_value()
    with until_ctrl_c():
        # The pace of a pair of eyes; the database is asked five times a second and never left a lock.
        for one in operations.follow(url, lambda: time.sleep(_TAIL_SECONDS)):
            if event_type not in (None, one.event_type) or aggregate_type not in (None, one.aggregate_type):
                continue
            if as_json:
                print_json(one.as_json(), flush=True)
            else:
                say(
                    f"{one.created_at:%T.%f} {one.id} {one.event_type} {one.aggregate_id} "
                    f"{json.dumps(one.payload, ensure_ascii=False)}"
                )
