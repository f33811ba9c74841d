"""Options that many commands share: times, filters, the actor, completion."""

import getpass
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

import typer

from dovecote.cli.system import routes

_AGO = re.compile(r"(\d+)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def time(given: str) -> datetime:
    """Return the time: ISO 8601, UTC if it has no zone, or an age such as 90s, 15m, 2h, 3d, 1w."""
    try:
        if ago := _AGO.fullmatch(given):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        found = datetime.fromisoformat(given)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{given!r} is no time: give ISO 8601 such as 2026-11-20T12:00, or an age such as 15m, 2h, 3d"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def identifier(given: str) -> UUID:
    """Return the UUID."""
    try:
        return UUID(given)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is no event id: that is a UUID") from None


def default_actor() -> str:
    """Return the operating system's user and host: user@host."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number that no name belongs to; KeyError before Python 3.13
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def complete_handler(incomplete: str) -> list[str]:
    return [route.handler for route in routes() if route.handler.startswith(incomplete)]


def complete_event_type(incomplete: str) -> list[str]:
    known = {event_type for route in routes() for event_type in route.event_types}
    return sorted(one for one in known if one.startswith(incomplete))


Handler = Annotated[str | None, typer.Option(help="Only this handler.", autocompletion=complete_handler)]
EventType = Annotated[
    str | None, typer.Option("--type", help="Only events of this type.", autocompletion=complete_event_type)
]
AggregateType = Annotated[str | None, typer.Option(help="Only events of aggregates of this type.")]
AggregateId = Annotated[str | None, typer.Option(help="Only events of this aggregate.")]
Since = Annotated[
    datetime | None,
    typer.Option(
        help="From here on: ISO 8601, UTC without a zone, or an age such as 15m, 2h, 3d.",
        parser=time,
        metavar="TIME",
    ),
]
Until = Annotated[datetime | None, typer.Option(help="Before this: ISO 8601, or an age.", parser=time, metavar="TIME")]
Before = Annotated[str | None, typer.Option(help="Go on where a page ended.")]
Limit = Annotated[int, typer.Option(min=1, max=1_000, help="Lines of one page, at most.")]
Actor = Annotated[
    str,
    typer.Option(
        "--actor", default_factory=default_actor, show_default="user@host", help="Who you are, for the audit log."
    ),
]
Reason = Annotated[str | None, typer.Option(help="Why, for the audit log.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
