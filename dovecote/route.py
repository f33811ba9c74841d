"""A route: one handler, and how its events reach it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dovecote import route_rules
from dovecote.errors import DomainError
from dovecote.events import Event, has_sensitive_fields, readable_as

__all__ = ["Route", "distinct", "queues", "routes_by_type"]


@dataclass(frozen=True)
class Route:
    """One handler and how its events reach it.

    act             function(event, uow, gateways), or function(envelopes, uow, gateways) with `bulk`; returns None
    bundle_size     most events of one message, which is one transaction
    bulk            the handler takes the whole bundle and is quicker that way
    ordered         events of one aggregate take effect in the order they were written
    attempts        tries before an event is dead
    backoff_seconds pause before the second try; it doubles, jittered, up to `longest_backoff_seconds`
    may_pass        refusals that are tried again like any error; other DomainErrors are final at once
    time_limit_seconds  longest an event may take, with `bulk` a bundle; then it is cut off, which is an attempt
    replayable      an operator may have it act again on what it has acted on; what its effect does then is
                    its own business
    replay_note     why it may, or why not; operators read it
    needs_keys      its handler uses `gateways.keys`: a process without keys does not start on its queue

    Errors: InvalidRoute for what could never act: an `async def`, a name that is no plain word, no attempts.
    """

    handler: str
    events: tuple[type[Event], ...]
    act: Callable[[Any, Any, Any], object]
    queue: str
    bundle_size: int = 500
    bulk: bool = False
    ordered: bool = False
    attempts: int = 8
    backoff_seconds: float = 2.0
    longest_backoff_seconds: float = 3_600.0
    may_pass: tuple[type[DomainError], ...] = ()
    time_limit_seconds: float = 60.0
    replayable: bool = False
    replay_note: str = "its route does not say that acting again is harmless"
    needs_keys: bool = False

    def __post_init__(self) -> None:
        route_rules.require_name("handler", self.handler)
        route_rules.require_queue(self.queue)
        route_rules.require_events(self.handler, self.events)
        route_rules.require_callable(self.handler, self.act)
        for name in ("bundle_size", "attempts"):
            route_rules.require_count(self.handler, name, getattr(self, name))
        for name in ("backoff_seconds", "longest_backoff_seconds"):
            route_rules.require_seconds(self.handler, name, getattr(self, name))
        route_rules.require_seconds(self.handler, "time_limit_seconds", self.time_limit_seconds, more_than_none=True)

    @property
    def event_types(self) -> list[str]:
        """Return the wire types it wants: of each event the newest version and those an upcaster leads from."""
        return [event_type for event in self.events for event_type in readable_as(event)]

    @property
    def wants_keys(self) -> bool:
        """Tell if its process needs keys: for its handler, or to open what its events say."""
        return self.needs_keys or any(has_sensitive_fields(event) for event in self.events)


def distinct(routes: Iterable[Route]) -> tuple[Route, ...]:
    """Return the routes of one system.

    Errors: InvalidRoute when two of them have one handler name, or would meet in one key of Redis.
    """
    routes = tuple(routes)
    route_rules.require_distinct([(route.handler, route.queue) for route in routes])
    return routes


def routes_by_type(routes: Sequence[Route]) -> Mapping[str, tuple[Route, ...]]:
    """Return who wants which wire type."""
    wanted: dict[str, tuple[Route, ...]] = {}
    for route in routes:
        for event_type in route.event_types:
            wanted[event_type] = (*wanted.get(event_type, ()), route)
    return wanted


def queues(routes: Sequence[Route]) -> list[str]:
    return sorted({route.queue for route in routes})
