"""Every operator verb. The command line, and one day the console, call nothing else.

One module a subject, which is imported when it is first needed: `operations.events.list_events(engine, ...)`. A verb
takes an engine, returns a dataclass and prints nothing; `list_x` returns a page, `get_x` one thing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dovecote.operations import (
        aggregates,
        audit,
        deliveries,
        doctor,
        events,
        handlers,
        keys,
        recover,
        replays,
        retention,
        status,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")


__all__ = [
    "aggregates",
    "audit",
    "deliveries",
    "doctor",
    "events",
    "handlers",
    "keys",
    "recover",
    "replays",
    "retention",
    "status",
]
