"""Commands about events: `events list`, `events show`, `events tail`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from dovecote import operations
from dovecote.cli.options import AggregateId, AggregateType, EventType, Limit, Since, Until, identifier
from dovecote.cli.output import AsJson, print_fields, print_json, print_listing, say, say_nothing, until_ctrl_c
from dovecote.cli.system import database, routes, settings

if TYPE_CHECKING:
    from dovecote.operations.events import EventLife

_TAIL_SECONDS = 0.2


events = typer.Typer(no_args_is_help=True, help="Look at events.")


@events.command("list")
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
    wanted = operations.events.EventSelection(
        event_type=event_type,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        since=since,
        until=until,
    )
    cursors = {"before": identifier(before) if before else None, "after": identifier(after) if after else None}
    with database() as engine:
        page = operations.events.list_events(engine, routes(), wanted, limit=limit, **cursors)
    if as_json:
        print_json(page)
        return
    print_listing(
        page.events,
        {
            "event": lambda one: one.id,
            "written": lambda one: f"{one.created_at:%F %T}",
            "type": lambda one: one.event_type,
            "aggregate": lambda one: f"{one.aggregate_type} {one.aggregate_id}",
            "handlers": lambda one: (
                ", ".join(f"{handler} {state}" for handler, state in one.handlers.items()) or "nobody wants it"
            ),
        },
        if_empty="no events",
    )
    if page.looked_back_to:
        say(
            f"looked as far as {page.looked_back_to:%F %T %Z}; --{'after' if after else 'before'} "
            f"{page.after if after else page.before} to go on"
        )
    elif page.before and not after:
        say(f"more: --before {page.before}")


@events.command()
def show(event_id: Annotated[str, typer.Argument(help="The event's id.")], as_json: AsJson = False) -> None:
    """Show one event's whole life: written, published, and what each handler did with it.

    Example: dovecote events show 019a...
    """
    with database() as engine:
        life = operations.events.get_event(engine, routes(), identifier(event_id))
    if as_json:
        print_json(life)
    else:
        _show_life(life)


def _show_life(life: EventLife) -> None:
    published = (
        f"{life.published_at:%F %T.%f %Z}, in a batch of {life.batch_events}, epoch {life.epoch}"
        if life.published_at
        else "not yet"
    )
    print_fields(
        {
            "event": f"{life.id}, position {life.position}",
            "type": life.event_type,
            "aggregate": f"{life.aggregate_type} {life.aggregate_id}",
            "written": f"{life.created_at:%F %T.%f %Z}",
            "published": published,
            "payload": json.dumps(life.payload, ensure_ascii=False),
            "headers": json.dumps(life.headers, ensure_ascii=False),
        }
    )
    say_nothing()
    print_listing(
        life.handlers,
        {
            "handler": lambda one: one.handler,
            "state": lambda one: one.state,
            "processed": lambda one: f"{one.processed_at:%F %T.%f}" if one.processed_at else None,
            "attempts": lambda one: one.attempts or None,
            "next": lambda one: f"{one.next_attempt_at:%F %T}" if one.next_attempt_at else None,
            "replay": lambda one: one.replay_id,
            "trace": lambda one: one.trace_id,
            "error": lambda one: one.summary,
        },
        if_empty="nobody wants it",
    )


@events.command()
def tail(
    event_type: EventType = None,
    aggregate_type: AggregateType = None,
    as_json: AsJson = False,
) -> None:
    """Show events as they commit, until Ctrl-C. With --json: one object a line.

    An event whose transaction takes long comes late, not never; those open when this began may be missing.

    Example: dovecote events tail --type pricing.price_quoted.v1
    """
    url = settings(needs_redis=False).database.url.get_secret_value()
    with until_ctrl_c():
        # The pace of a pair of eyes; the database is asked five times a second and never left a lock.
        # The pace of the display: a tail is read-only, and no channel is notified of every event.
        for one in operations.events.tail_events(url, lambda: time.sleep(_TAIL_SECONDS)):
            if event_type not in (None, one.event_type) or aggregate_type not in (None, one.aggregate_type):
                continue
            if as_json:
                print_json(one, flush=True)
            else:
                say(
                    f"{one.created_at:%T.%f} {one.id} {one.event_type} {one.aggregate_id} "
                    f"{json.dumps(one.payload, ensure_ascii=False)}"
                )
