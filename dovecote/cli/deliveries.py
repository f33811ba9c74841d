"""`dovecote deliveries`: look at failed deliveries, retry or discard them."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from dovecote import operations
from dovecote.cli.options import (
    Actor,
    AggregateId,
    AggregateType,
    Before,
    DryRun,
    EventType,
    Handler,
    Limit,
    Reason,
    complete_handler,
    identifier,
    time,
)
from dovecote.cli.output import AsJson, print_fields, print_json, print_listing, render, say, say_block, say_nothing
from dovecote.cli.system import database, routes
from dovecote.processes.terminal import refuse
from dovecote.store.delivery_state import DeliveryState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dovecote.operations.deliveries import Change, Delivery, DeliverySelection, Groups

StateOption = Annotated[DeliveryState | None, typer.Option(help="Only deliveries of this state.")]
Fingerprint = Annotated[str | None, typer.Option(help="Only failures of this kind, as `deliveries list` names it.")]
ChangedSince = Annotated[
    datetime | None,
    typer.Option(
        "--since",
        help="Only what changed since: ISO 8601, UTC without a zone, or an age such as 15m, 2h, 3d.",
        parser=time,
        metavar="TIME",
    ),
]
OneHandler = Annotated[str | None, typer.Argument(help="The handler of one delivery.", autocompletion=complete_handler)]
OneEvent = Annotated[str | None, typer.Argument(help="The event of one delivery.")]
AllMatching = Annotated[bool, typer.Option("--all-matching", help="Every delivery that the filters leave.")]


deliveries = typer.Typer(no_args_is_help=True, help="Look at failed deliveries; retry or discard them.")


@deliveries.command("list")
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
    before: Before = None,
    as_json: AsJson = False,
) -> None:
    """Show failures by kind, the dead ones if no state is given; or one by one, when a filter or --rows asks for it.

    Example: dovecote deliveries list --state dead --rows
    """
    wanted = _filter(handler, state, fingerprint, event_type, aggregate_type, aggregate_id, since)
    by_kind = not (rows or before or event_type or aggregate_type or aggregate_id or since)
    with database() as engine:
        if by_kind:
            groups = operations.deliveries.list_delivery_groups(engine, wanted, routes=routes(), limit=limit)
        else:
            page = operations.deliveries.list_deliveries(engine, wanted, routes=routes(), limit=limit, before=before)
    if not by_kind:
        render(page, _columns(), name="deliveries", if_empty="none", as_json=as_json)
    elif as_json:
        print_json(groups)
    else:
        _show_groups(groups)
        if groups.more:
            say(f"more kinds than these {limit}: --limit, --handler or --fingerprint")


@deliveries.command()
def show(
    handler: Annotated[str, typer.Argument(help="The handler.", autocompletion=complete_handler)],
    event_id: Annotated[str, typer.Argument(help="The event.")],
    as_json: AsJson = False,
) -> None:
    """Show one delivery with its traceback, and what waits behind it.

    Example: dovecote deliveries show billing.write_history 019a...
    """
    with database() as engine:
        found = operations.deliveries.get_delivery(engine, routes(), handler, identifier(event_id))
    if as_json:
        print_json(found)
        return
    one = found.delivery
    print_fields(
        {
            "handler": one.handler,
            "event": f"{one.event_id}, {one.event_type}, position {one.position}",
            "aggregate": f"{one.aggregate_type} {one.aggregate_id}",
            "state": f"{one.state} after {one.attempts} attempts",
            "next attempt": f"{one.next_attempt_at:%F %T %Z}" if one.next_attempt_at else None,
            "waits for": found.waits_for,
            "first failed": f"{one.first_failed_at:%F %T %Z}",
            "last change": f"{one.updated_at:%F %T %Z}",
            "kind": one.fingerprint,
            "trace": found.trace_id,
            "behind it": f"{found.waiting_behind} waiting" if found.waiting_behind else None,
        }
    )
    if found.traceback:
        say_nothing()
        say_block(found.traceback)


@deliveries.command()
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
    filters = _filter(handler, state, fingerprint, event_type, aggregate_type, aggregate_id, since)
    wanted = _wanted(handler_name, event_id, all_matching, filters)
    with database() as engine:
        change = operations.deliveries.retry(
            engine, wanted, actor=actor, reason=reason, dry_run=dry_run, routes=routes()
        )
    _report(change, "sent again", as_json)


@deliveries.command()
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
    filters = _filter(handler, state, fingerprint, event_type, aggregate_type, aggregate_id, since)
    wanted = _wanted(handler_name, event_id, all_matching, filters)
    with database() as engine:
        change = operations.deliveries.discard(
            engine, wanted, actor=actor, reason=reason, dry_run=dry_run, routes=routes()
        )
    _report(change, "discarded", as_json)


def _filter(
    handler: str | None,
    state: DeliveryState | None,
    fingerprint: str | None,
    event_type: str | None,
    aggregate_type: str | None,
    aggregate_id: str | None,
    since: datetime | None,
) -> DeliverySelection:
    return operations.deliveries.DeliverySelection(
        handler=handler,
        state=state.value if state else None,
        fingerprint=fingerprint,
        event_type=event_type,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        since=since,
    )


def _wanted(
    handler: str | None, event_id: str | None, all_matching: bool, filters: DeliverySelection
) -> DeliverySelection:
    """Return what exactly one of the three ways to name deliveries asks for, or end with code 2."""
    if handler is not None:
        if event_id is None:
            refuse(f"which event of {handler}? Give HANDLER EVENT_ID, or --all-matching --handler {handler}")
        if all_matching or filters != operations.deliveries.DeliverySelection():
            refuse("give either HANDLER EVENT_ID or filters, not both")
        return operations.deliveries.DeliverySelection(handler=handler, event_id=identifier(event_id))
    if not all_matching and filters.fingerprint is None:
        refuse("name one as HANDLER EVENT_ID, a kind by --fingerprint, or say --all-matching with filters or without")
    return filters


def _report(change: Change, done: str, as_json: bool) -> None:
    if as_json:
        print_json(change)
        return
    if change.dry_run:
        say(f"{change.affected} would be {done}; nothing was changed")
        print_listing(change.sample, _columns(), if_empty="none")
        if change.affected > len(change.sample):
            say(f"and {change.affected - len(change.sample)} more")
        return
    released = f"; {change.released} that waited behind go on" if change.released else ""
    busy = f"; {change.busy} were being tried just then and were left alone" if change.busy else ""
    say(f"{change.affected} {done}{released}{busy}")


def _show_groups(groups: Groups) -> None:
    print_listing(
        groups.groups,
        {
            "count": lambda one: f"{one.count}{'+' if one.at_least else ''}",
            "handler": lambda one: one.handler,
            "state": lambda one: one.state,
            "kind": lambda one: one.fingerprint,
            "first": lambda one: f"{one.first_at:%F %T}",
            "last": lambda one: f"{one.last_at:%F %T}",
            "example": lambda one: one.example,
            "error": lambda one: one.error or one.error_type,
        },
        if_empty="nothing of that kind",
    )


def _columns() -> Mapping[str, Callable[[Delivery], object]]:
    return {
        "event": lambda one: one.event_id,
        "handler": lambda one: one.handler,
        "state": lambda one: one.state,
        "attempts": lambda one: one.attempts,
        "next": lambda one: f"{one.next_attempt_at:%F %T}" if one.next_attempt_at else None,
        "aggregate": lambda one: f"{one.aggregate_type} {one.aggregate_id}",
        "kind": lambda one: one.fingerprint,
        "error": lambda one: one.error,
    }
