"""Commands about what did not go well: `deliveries` and `aggregates`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from dovecote.cli.options import (
    Actor,
    AggregateId,
    AggregateType,
    DryRun,
    EventType,
    Handler,
    Limit,
    Reason,
    complete_handler,
    identifier,
    moment,
)
from dovecote.cli.output import AsJson, add_row, print_json, print_table, say, say_block, say_nothing
from dovecote.processes.terminal import refuse
from dovecote.store.delivery_state import DeliveryState

if TYPE_CHECKING:
    from dovecote import operations
    from dovecote.operations import Change, Failure, Filter


StateOption = Annotated[DeliveryState | None, typer.Option(help="Only deliveries of this state.")]
Fingerprint = Annotated[str | None, typer.Option(help="Only failures of this kind, as `deliveries list` names it.")]
ChangedSince = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        help="Only what changed since: ISO 8601, UTC without a zone, or an age such as 15m, 2h, 3d.",
        parser=moment,
        metavar="MOMENT",
    ),
]
OneHandler = Annotated[str | None, typer.Argument(help="The handler of one delivery.", autocompletion=complete_handler)]
OneEvent = Annotated[str | None, typer.Argument(help="The event of one delivery.")]
AllMatching = Annotated[bool, typer.Option("--all-matching", help="Every delivery that the filters leave.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    deliveries = typer.Typer(no_args_is_help=True, help="Look at what did not go well; retry it or give it up.")
    for name, command in (("list", list_), ("show", show), ("retry", retry), ("discard", discard)):
        deliveries.command(name)(command)
    app.add_typer(deliveries, name="deliveries")
    aggregates = typer.Typer(no_args_is_help=True, help="Look at aggregates that stand still.")
    aggregates.command("blocked")(blocked)
    app.add_typer(aggregates, name="aggregates")


def list_(
    rows: Annotated[bool, typer.Option("--rows", help="One line a delivery instead of one a kind.")] = False,
    handler: Handler = None,
    state: StateOption = None,
    fingerprint: Fingerprint = None,
    event_type: EventType = None,
    aggregate_type: AggregateType = None,
    aggregate_id: AggregateId = None,
    since: ChangedSince = None,
    limit: Limit = 50,
    before: Annotated[str | None, typer.Option(help="Go on where a page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show failures by kind, the dead ones if no state is given; or one by one, when a filter or --rows asks for it.

    Example: dovecote deliveries list --state dead --rows
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    wanted = _filter(handler, state, fingerprint, event_type, aggregate_type, aggregate_id, since)
    by_kind = not (rows or before or event_type or aggregate_type or aggregate_id or since)
    with engine_during(load_settings(needs_redis=False)) as engine:
        if by_kind:
            groups = operations.failure_groups(engine, wanted, routes=find_app().routes, limit=limit)
        else:
            page = operations.failures(engine, wanted, routes=find_app().routes, limit=limit, before=before)
    if as_json:
        print_json(groups.as_json() if by_kind else page.as_json())
    elif by_kind:
        _show_groups(groups)
        if groups.more:
            say(f"more kinds than these {limit}: --limit, --handler or --fingerprint")
    else:
        _show_rows(page.deliveries)
        if page.before:
            say(f"more: --before {page.before}")


def show(
    handler: Annotated[str, typer.Argument(help="The handler.", autocompletion=complete_handler)],
    event_id: Annotated[str, typer.Argument(help="The event.")],
    as_json: AsJson = False,
) -> None:
    """Show one delivery with its traceback, and what waits behind it.

    Example: dovecote deliveries show billing.write_history 019a...
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        story = operations.failure(engine, find_app().routes, handler, identifier(event_id))
    if as_json:
        print_json(story.as_json())
        return
    one = story.delivery
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("handler", one.handler),
        ("event", f"{one.event_id}, {one.event_type}, position {one.position}"),
        ("aggregate", f"{one.aggregate_type} {one.aggregate_id}"),
        ("state", f"{one.state} after {one.attempts} attempts"),
        ("next attempt", f"{one.next_attempt_at:%F %T %Z}" if one.next_attempt_at else ""),
        ("waits for", story.waits_for),
        ("first failed", f"{one.first_failed_at:%F %T %Z}"),
        ("last change", f"{one.updated_at:%F %T %Z}"),
        ("kind", one.fingerprint),
        ("trace", story.trace_id),
        ("behind it", f"{story.waiting_behind} waiting" if story.waiting_behind else ""),
    ):
        if value:
            add_row(table, name, value)
    print_table(table, "")
    if story.traceback:
        say_nothing()
        say_block(story.traceback)


def retry(
    actor: Actor,
    handler_name: OneHandler = None,
    event_id: OneEvent = None,
    all_matching: AllMatching = False,
    handler: Handler = None,
    state: StateOption = None,
    fingerprint: Fingerprint = None,
    event_type: EventType = None,
    aggregate_type: AggregateType = None,
    aggregate_id: AggregateId = None,
    since: ChangedSince = None,
    reason: Reason = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Send dead deliveries again at once: one, all of a kind (--fingerprint), or all that match filters.

    Each has all of its route's attempts before it again. --state retrying: do not wait for the next attempt.

    Example: dovecote deliveries retry --all-matching --handler billing.write_history --dry-run
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    filters = _filter(handler, state, fingerprint, event_type, aggregate_type, aggregate_id, since)
    wanted = _wanted(handler_name, event_id, all_matching, filters)
    with engine_during(load_settings(needs_redis=False)) as engine:
        change = operations.retry(engine, wanted, actor=actor, reason=reason, dry_run=dry_run, routes=find_app().routes)
    _tell(change, "sent again", as_json)


def discard(
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
    actor: Actor,
    handler_name: OneHandler = None,
    event_id: OneEvent = None,
    all_matching: AllMatching = False,
    handler: Handler = None,
    state: StateOption = None,
    fingerprint: Fingerprint = None,
    event_type: EventType = None,
    aggregate_type: AggregateType = None,
    aggregate_id: AggregateId = None,
    since: ChangedSince = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Give up dead deliveries for good; what waits behind them goes on, in order.

    Example: dovecote deliveries discard --fingerprint 3f2a90c1b7de --reason "test data" --dry-run
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    filters = _filter(handler, state, fingerprint, event_type, aggregate_type, aggregate_id, since)
    wanted = _wanted(handler_name, event_id, all_matching, filters)
    with engine_during(load_settings(needs_redis=False)) as engine:
        change = operations.discard(
            engine, wanted, actor=actor, reason=reason, dry_run=dry_run, routes=find_app().routes
        )
    _tell(change, "discarded", as_json)


def blocked(
    handler: Handler = None,
    limit: Limit = 50,
    after: Annotated[str | None, typer.Option(help="Go on where a page ended.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show aggregates that stand still: which event holds each up, and how many wait behind it.

    Example: dovecote aggregates blocked
    """
    from dovecote import operations
    from dovecote.settings import load_settings
    from dovecote.settings.application import find_app
    from dovecote.store.engines import engine_during

    with engine_during(load_settings(needs_redis=False)) as engine:
        page = operations.blocked_aggregates(engine, find_app().routes, handler=handler, limit=limit, after=after)
    if as_json:
        print_json(page.as_json())
        return
    table = Table("handler", "aggregate", "held up by", "state", "waiting", "since", "error", box=None, pad_edge=False)
    for one in page.aggregates:
        add_row(
            table,
            one.handler,
            f"{one.aggregate_type} {one.aggregate_id}",
            str(one.event_id or ""),
            one.state,
            f"{one.waiting}{'+' if one.at_least else ''}",
            f"{one.since:%F %T}",
            f"{one.fingerprint} {one.error}" if one.error else "",
        )
    print_table(table, "no aggregate is blocked")
    if page.after:
        say(f"more: --after {page.after}")


def _filter(
    handler: str | None,
    state: DeliveryState | None,
    fingerprint: str | None,
    event_type: str | None,
    aggregate_type: str | None,
    aggregate_id: str | None,
    since: datetime | None,
) -> Filter:
    from dovecote.operations import Filter

    return Filter(
        handler=handler,
        state=state.value if state else None,
        fingerprint=fingerprint,
        event_type=event_type,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        since=since,
    )


def _wanted(handler: str | None, event_id: str | None, all_matching: bool, filters: Filter) -> Filter:
    """Return what exactly one of the three ways to name deliveries asks for, or end with code 2."""
    from dovecote.operations import Filter

    if handler is not None:
        if event_id is None:
            refuse(f"which event of {handler}? Give HANDLER EVENT_ID, or --all-matching --handler {handler}")
        if all_matching or filters != Filter():
            refuse("give either HANDLER EVENT_ID or filters, not both")
        return Filter(handler=handler, event_id=identifier(event_id))
    if not all_matching and filters.fingerprint is None:
        refuse("name one as HANDLER EVENT_ID, a kind by --fingerprint, or say --all-matching with filters or without")
    return filters


def _tell(change: Change, done: str, as_json: bool) -> None:
    if as_json:
        print_json(change.as_json())
        return
    if change.dry_run:
        say(f"{change.affected} would be {done}; nothing was changed")
        _show_rows(change.sample)
        if change.affected > len(change.sample):
            say(f"and {change.affected - len(change.sample)} more")
        return
    released = f"; {change.released} that waited behind go on" if change.released else ""
    busy = f"; {change.busy} were being tried at that moment and were left alone" if change.busy else ""
    say(f"{change.affected} {done}{released}{busy}")


def _show_groups(groups: operations.Groups) -> None:
    table = Table("count", "handler", "state", "kind", "first", "last", "example", "error", box=None, pad_edge=False)
    for one in groups.groups:
        add_row(
            table,
            f"{one.count}{'+' if one.at_least else ''}",
            one.handler,
            one.state,
            one.fingerprint,
            f"{one.first_at:%F %T}",
            f"{one.last_at:%F %T}",
            one.example,
            one.error or one.error_type,
        )
    print_table(table, "nothing of that kind")


def _show_rows(found: list[Failure]) -> None:
    table = Table(
        "event", "handler", "state", "attempts", "next", "aggregate", "kind", "error", box=None, pad_edge=False
    )
    for one in found:
        add_row(
            table,
            str(one.event_id),
            one.handler,
            one.state,
            str(one.attempts),
            f"{one.next_attempt_at:%F %T}" if one.next_attempt_at else "",
            f"{one.aggregate_type} {one.aggregate_id}",
            one.fingerprint or "",
            one.error or "",
        )
    print_table(table, "none")
