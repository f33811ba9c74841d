"""Options that many commands share: moments, filters, who is asking, completion."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

import typer

_AGO = re.compile(r"(\d+)([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def moment(given: str) -> datetime:
    """Return the moment: ISO 8601, UTC if it has no zone, or an age such as 90s, 15m, 2h, 3d, 1w."""
    try:
        if ago := _AGO.fullmatch(given):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        found = datetime.fromisoformat(given)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{given!r} is no moment: give ISO 8601 such as 2026-11-20T12:00, or an age such as 15m, 2h, 3d"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def identifier(given: str) -> UUID:
    """Return the UUID."""
    try:
        return UUID(given)
    except ValueError:
        raise typer.BadParameter(f"{given!r} is no event id: that is a UUID") from None


def complete_handler(incomplete: str) -> list[str]:
    from dovecote.settings.application import find_app

    return [route.handler for route in find_app().routes if route.handler.startswith(incomplete)]


def complete_event_type(incomplete: str) -> list[str]:
    from dovecote.settings.application import find_app

    known = {event_type for route in find_app().routes for event_type in route.event_types}
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
        parser=moment,
        metavar="MOMENT",
    ),
]
Until = Annotated[
    datetime | None, typer.Option(help="Before this: ISO 8601, or an age.", parser=moment, metavar="MOMENT")
]
Limit = Annotated[int, typer.Option(min=1, max=1_000, help="Most lines of one page.")]


def _default_actor() -> str:
    from dovecote.operations.audit import whoever

    return whoever()


Actor = Annotated[
    str,
    typer.Option(
        "--as", default_factory=_default_actor, show_default="user@host", help="Who you are, for the audit log."
    ),
]
Reason = Annotated[str | None, typer.Option(help="Why, for the audit log.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")]
