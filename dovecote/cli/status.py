"""`dovecote status`: the state of relay and handlers; --watch keeps it current."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dovecote import operations
from dovecote.cli.output import AsJson, Legible, add_row, cell, live_screen, out, print_json, show, until_ctrl_c
from dovecote.cli.system import database, routes

if TYPE_CHECKING:
    from dovecote.operations.status import HandlerStatus, RelayStatus, Status

# Lines for types without a route: a writer may invent any number.
_MAX_UNROUTED = 20


def status(
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl-C.")] = False,
    every_seconds: Annotated[float, typer.Option(min=0.2, help="Pause between two looks of --watch.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """Show how far the relay is and how each handler stands. With --watch --json: one object a line.

    Example: dovecote status --watch
    """
    with database() as engine:

        def look() -> Status:
            return operations.status.get_status(engine, routes())

        if not watch:
            found = look()
            if as_json:
                print_json(found)
            else:
                show(_screen(found))
            return
        with until_ctrl_c():
            _watch(look, every_seconds, as_json)


def _watch(look: Callable[[], Status], every_seconds: float, as_json: bool) -> None:
    if as_json:
        for found in _looks(look, every_seconds):
            print_json(found, flush=True)
        return
    if not out.is_terminal:
        for found in _looks(look, every_seconds):
            show(_screen(found))
        return
    with live_screen() as live:
        for found in _looks(look, every_seconds):
            live.update(Legible(_screen(found)), refresh=True)


def _looks(look: Callable[[], Status], every_seconds: float) -> Iterator[Status]:
    while True:
        yield look()
        time.sleep(every_seconds)  # the pace the operator asked for


def _screen(found: Status) -> RenderableType:
    from dovecote.store.runs import Run

    relay = found.relay
    leader = f"led by {relay.owner}" if relay.leading else "nobody leads"
    if relay.stands_back_for:
        leader = f"stands back for a relay of {Run.read(relay.stands_back_for)}"
    first = cell(
        f"relay    {leader}; {_count(relay, 'lag_events')} events behind, {relay.lag_seconds:.1f} s; "
        f"{_count(relay, 'published')} published, {relay.published_per_second:g}/s"
    )
    if not relay.leading or relay.lag_seconds > 10 or relay.fault:
        first.stylize("bold red")
    fault = [cell(f"no relay may lead: {relay.fault}", "bold red")] if relay.fault else []
    strangers = [cell(f"lock     {lock}: {lock.cure}", "yellow") for lock in relay.foreign_locks]
    return Group(first, *fault, *strangers, *_history(relay), _handlers(found), *_pauses(found), *_unrouted(found))


def _history(relay: RelayStatus) -> Iterator[Text]:
    from dovecote.store.runs import Run

    if relay.history:
        yield cell(f"history  {relay.history}, epoch {relay.epoch}, of {Run.read(relay.instance)}")


def _unrouted(found: Status) -> Iterator[Text]:
    for kind in found.unrouted[:_MAX_UNROUTED]:
        deploy = f"; {', '.join(kind.wanted_by)} will get them from code that knows it" if kind.wanted_by else ""
        yield cell(f"no route for {kind.event_type}: about {kind.events} events, kept in the outbox{deploy}")
    if more := found.unrouted[_MAX_UNROUTED:]:
        yield cell(
            f"no route for {len(more)} more types: about {sum(kind.events for kind in more)} events; --json lists them"
        )


def _handlers(found: Status) -> Table:
    table = Table("handler", box=None, pad_edge=False)
    for column in ("processed", "a second", "unprocessed", "retrying", "waiting", "dead", "oldest unprocessed"):
        table.add_column(column, justify="right")
    for name, handler in found.handlers.items():
        add_row(
            table,
            name,
            _count(handler, "processed"),
            f"{handler.processed_per_second:g}",
            *(_count(handler, column) for column in ("unprocessed", "retrying", "waiting")),
            cell(_count(handler, "dead"), "bold red" if handler.dead else ""),
            f"{handler.oldest_unprocessed_seconds:.1f} s" if handler.unprocessed else "",
        )
    return table


def _pauses(found: Status) -> Iterator[Text]:
    for name, handler in found.handlers.items():
        if pause := handler.paused:
            yield cell(f"paused: {name}, by {pause.actor} since {pause.since:%F %T %Z}: {pause.reason}", "yellow")


def _count(of: HandlerStatus | RelayStatus, name: str) -> str:
    return f"{getattr(of, name)}{'+' if name in of.at_least else ''}"
