"""What an application hands to the library: its routes, and the app object that holds them.

A route is one handler and how its events reach it. What it must be is checked when it is made: what breaks these rules
would be found out by lost events. A name is written into Redis keys, into JSON by hand, and into rows: plain words
everywhere.
"""

import functools
import inspect
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dovecote.errors import DomainError, DovecoteError
from dovecote.events import Event, has_sensitive_fields, readable_as

if TYPE_CHECKING:
    from dovecote.unit_of_work import UnitOfWork
    from dovecote.unit_of_work.backoff import Backoff

__all__ = [
    "Command",
    "Dovecote",
    "InvalidRoute",
    "Purge",
    "ReturnedValue",
    "Route",
    "distinct",
    "queues",
    "require_nothing_returned",
    "routes_by_type",
]

#: Removes a bounded number of rows that are over at a time and returns how many; 0 when none is left. It locks rows
#: that nobody else has locked, so it waits for nobody.
Purge = Callable[["UnitOfWork", datetime], int]

# The part of a pause before a retry that is taken off at random: what failed together does not come back together.
_JITTER = 0.5
_MAX_NAME_LENGTH = 200
_NAME = re.compile(r"[A-Za-z0-9_.:-]+")
# Dramatiq's rule for a queue.
_QUEUE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# Dramatiq's and our own, for what belongs to a queue: messages that wait, are dead, are in flight, were in a
# crash, are held.
_SUFFIXES = (".DQ", ".XQ", ".msgs", ".in_flight", ".crashes")
_HELD = ".held."
# The broker's own keys: __relay__, __heartbeats__, __acks__.
_OWN = "__"

_AWAIT = "make it a `def`, and run what must be awaited with asyncio.run(...)"
_NO_YIELD = "make it a function without `yield`"


class InvalidRoute(DovecoteError, ValueError):
    """A route that could never work as it is written."""


class ReturnedValue(DovecoteError):
    """A handler returned something, which nobody looks at: what it meant to do with it was not done."""


@dataclass(frozen=True)
class Route:
    """One handler and how its events reach it.

    function        function(event, uow, gateways), or function(envelopes, uow, gateways) with `bulk`; returns None
    bundle_size     most events of one message, which is one transaction
    bulk            the handler takes the whole bundle and is quicker that way
    ordered         events of one aggregate take effect in the order they were written
    max_attempts    tries before an event is dead
    backoff_seconds pause before the second try; it doubles, jittered, up to `max_backoff_seconds`
    transient_errors        refusals that are tried again like any error; other DomainErrors are final at once
    time_limit_seconds  longest an event may take, with `bulk` a bundle; then it is cut off, which is an attempt
    replayable      an operator may have it act again on what it has acted on; what its effect does then is
                    its own business
    replay_note     why it may, or why not; operators read it
    needs_keys      its handler uses `gateways.keys`: a process without keys does not start on its queue

    Errors: InvalidRoute for what could never act: an `async def`, a name that is no plain word, no attempts.
    """

    handler: str
    events: tuple[type[Event], ...]
    function: Callable[[Any, Any, Any], object]
    queue: str
    bundle_size: int = 500
    bulk: bool = False
    ordered: bool = False
    max_attempts: int = 8
    backoff_seconds: float = 2.0
    max_backoff_seconds: float = 3_600.0
    transient_errors: tuple[type[DomainError], ...] = ()
    time_limit_seconds: float = 60.0
    replayable: bool = False
    replay_note: str = "its route does not say that acting again is harmless"
    needs_keys: bool = False

    def __post_init__(self) -> None:
        require_name("handler", self.handler)
        require_queue(self.queue)
        require_events(self.handler, self.events)
        require_callable(self.handler, self.function)
        for name in ("bundle_size", "max_attempts"):
            require_count(self.handler, name, getattr(self, name))
        for name in ("backoff_seconds", "max_backoff_seconds"):
            require_seconds(self.handler, name, getattr(self, name))
        require_seconds(self.handler, "time_limit_seconds", self.time_limit_seconds, more_than_none=True)

    @property
    def event_types(self) -> list[str]:
        """Return the wire types it wants: of each event the newest version and those an upcaster leads from."""
        return [event_type for event in self.events for event_type in readable_as(event)]

    def backoff(self, attempts: int) -> timedelta:
        """Return the pause after this many attempts: doubling from the first, half of it jitter."""
        return timedelta(seconds=self._backoff.pause_seconds(attempts))

    def outage_pause(self, age: timedelta) -> timedelta:
        """Return the pause while a provider is away: as long as it has been away, within the route's limits."""
        seconds = min(max(age.total_seconds(), self.backoff_seconds), self.max_backoff_seconds)
        return timedelta(seconds=seconds * random.uniform(1.0 - _JITTER, 1.0))

    @property
    def longest_retry(self) -> timedelta:
        """Return how long after its first failure an event may be tried for the last time, providers being there."""
        pauses = (self._backoff.max_pause_seconds(attempts) for attempts in range(1, self.max_attempts))
        return timedelta(seconds=sum(pauses))

    @property
    def _backoff(self) -> "Backoff":
        from dovecote.unit_of_work.backoff import (
            Backoff,
        )  # SQLAlchemy comes with it, which `dovecote --help` does not need

        return Backoff(self.backoff_seconds, self.max_backoff_seconds, _JITTER)

    @property
    def wants_keys(self) -> bool:
        """Return whether its process needs keys: for its handler, or to open what its events say."""
        return self.needs_keys or any(has_sensitive_fields(event) for event in self.events)


def distinct(routes: Iterable[Route]) -> tuple[Route, ...]:
    """Return the routes of one system.

    Errors: InvalidRoute when two of them have one handler name, or would meet in one key of Redis.
    """
    routes = tuple(routes)
    require_distinct([(route.handler, route.queue) for route in routes])
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


def _no_gateways(_settings: Any) -> None:
    return None


@dataclass(frozen=True)
class Command:
    """A command of `dovecote`, or a group of them, which is imported when it is called.

    target          "package.module:name" of a function as Typer takes it, or of a typer.Typer with its commands
    help            one line, for the list of commands; the rest of the help is in the function's docstring
    passes_options  options that it does not know belong to its arguments
    """

    target: str
    help: str
    passes_options: bool = False


class Dovecote:
    """An application: what the library gets from it. `DOVECOTE_APP=package.module:name` says where it is.

    routes      every handler there is
    gateways    function(settings) that makes what handlers get as `gateways`, once in each process of consumers
    commands    what the application adds to `dovecote`, by name
    migrations  directory with `versions/` and `sql/`: the application's revisions, which depend on the library's
    purges      each removes personal data whose time is over; the leading relay runs them once an hour, and so does
                `dovecote maintain`
    procfile    what `dovecote up` runs; without one it is ./Procfile

    Routes, gateways and purges may be given as "package.module:name": then they are imported when they are needed, and
    a command that needs none of them starts at once.
    Errors: InvalidRoute when two routes have one handler name, and for a text that names nothing.
    """

    def __init__(
        self,
        *,
        routes: Sequence[Route] | str,
        gateways: Callable[[Any], Any] | str = _no_gateways,
        commands: Mapping[str, Command] = MappingProxyType({}),
        migrations: Path | None = None,
        purges: Sequence[Purge | str] = (),
        procfile: Path | None = None,
    ) -> None:
        self.commands = commands
        self.migrations = migrations
        self.procfile = procfile
        self._routes = routes if isinstance(routes, str) else distinct(routes)
        self._gateways = gateways
        self._purges = purges

    def with_routes(self, routes: Sequence[Route]) -> "Dovecote":
        """Return the same application with other routes, such as for a benchmark."""
        return Dovecote(
            routes=routes,
            gateways=self._gateways,
            commands=self.commands,
            migrations=self.migrations,
            purges=self._purges,
            procfile=self.procfile,
        )

    @cached_property
    def routes(self) -> Sequence[Route]:
        return distinct(_imported(self._routes)) if isinstance(self._routes, str) else self._routes

    @cached_property
    def gateways(self) -> Callable[[Any], Any]:
        gateways: Callable[[Any], Any] = _imported(self._gateways)
        return gateways

    @cached_property
    def purges(self) -> Sequence[Purge]:
        return [_imported(purge) for purge in self._purges]

    @property
    def migration_locations(self) -> tuple[Path, ...]:
        """Return the directories of its revisions, as `dovecote.migrations` wants them."""
        return () if self.migrations is None else (self.migrations,)


def require_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > _MAX_NAME_LENGTH:
        raise InvalidRoute(
            f"{what} {_shown(name)} is no plain name: letters, digits and _ - . : only, "
            f"one to {_MAX_NAME_LENGTH} characters"
        )


def require_queue(name: object) -> None:
    require_name("queue", name)
    assert isinstance(name, str)
    if not _QUEUE.fullmatch(name):
        raise InvalidRoute(
            f"queue {_shown(name)} is no name for a queue of Dramatiq's: a letter or _ first, "
            "then letters, digits and _ - . only"
        )
    if name.startswith(_OWN) or name.endswith(_SUFFIXES) or _HELD in name:
        raise InvalidRoute(
            f"queue {name!r} would share keys in Redis with something else: "
            f"no name may begin with {_OWN}, end in {', '.join(_SUFFIXES)} or contain {_HELD}"
        )


def require_callable(handler: str, function: object) -> None:
    """Errors: InvalidRoute for what cannot be called as function(event, uow, gateways) and be done when it returns."""
    if inspect.isclass(function):
        raise InvalidRoute(
            f"{handler}: its function is the class {function.__name__}; give a function, or a bound method"
        )
    if not callable(function):
        raise InvalidRoute(f"{handler}: its function is {_shown(function)}, which cannot be called; give a function")
    for layer in _layers(function):
        if inspect.iscoroutinefunction(layer) or inspect.isasyncgenfunction(layer):
            raise InvalidRoute(
                f"{handler}: its function is an `async def`, and nobody would await it: {_AWAIT}. A function around it "
                "that does so already must not say that it wraps it (functools.wraps sets __wrapped__)"
            )
        if inspect.isgeneratorfunction(layer):
            raise InvalidRoute(f"{handler}: its function is a generator, whose body would never run: {_NO_YIELD}")
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (ValueError, TypeError):
        return  # a function of C without a signature: it says so itself when it is called
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise InvalidRoute(
            f"{handler}: its function is called with three arguments, (event, uow, gateways) "
            f"or with bulk=True (envelopes, uow, gateways), and takes {signature}: {error}"
        ) from None


def require_count(handler: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidRoute(f"{handler}: {name} is {_shown(value)}; it must be a whole number, 1 at least")


def require_seconds(handler: str, name: str, value: object, *, more_than_none: bool = False) -> None:
    seconds = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(seconds) or seconds < 0 or (more_than_none and seconds == 0):
        wanted = "more than 0" if more_than_none else "0 or more"
        raise InvalidRoute(f"{handler}: {name} is {_shown(value)}; it must be a number of seconds, {wanted}")


def require_events(handler: str, events: object) -> None:
    if not isinstance(events, Sequence) or not all(inspect.isclass(e) and issubclass(e, Event) for e in events):
        raise InvalidRoute(f"{handler}: its events are {_shown(events)}; give a tuple of event classes: (OrderPlaced,)")


def require_nothing_returned(handler: str, returned: object) -> None:
    """Errors: ReturnedValue for anything but None; a coroutine or generator is closed."""
    if returned is None:
        return
    if inspect.iscoroutine(returned) or inspect.isgenerator(returned):
        returned.close()
    if inspect.isawaitable(returned) or inspect.isasyncgen(returned):
        raise ReturnedValue(f"{handler} returned {_a(returned)}, which nobody awaits: {_AWAIT}")
    if inspect.isgenerator(returned):
        raise ReturnedValue(f"{handler} returned a generator, whose body never ran: {_NO_YIELD}")
    raise ReturnedValue(f"{handler} returned {_a(returned)}; a handler returns nothing: its effect is what it writes")


def require_distinct(names: Sequence[tuple[str, str]]) -> None:
    """Errors: InvalidRoute when two of these pairs of handler and queue could be taken for each other."""
    twice = [handler for handler, times in Counter(handler for handler, _ in names).items() if times > 1]
    if twice:
        raise InvalidRoute(
            f"more than one route has the handler name {twice[0]!r}: each handler needs a name of its own, "
            "or each would take the other's events for done"
        )


def _layers(function: Any) -> list[object]:
    """Return the callable and what it calls, through partials, bound methods, wrappers and `__call__`."""
    layers: list[object] = []
    following: list[Any] = [function]
    while following:
        one = following.pop()
        if any(one is seen for seen in layers):
            continue
        layers.append(one)
        if isinstance(one, functools.partial | functools.partialmethod):
            following.append(one.func)
        elif inspect.ismethod(one):
            following.append(one.__func__)
        elif not inspect.isroutine(one):
            following.append(getattr(type(one), "__call__", None))  # noqa: B004  # what it calls, not whether
        if (wrapped := getattr(one, "__wrapped__", None)) is not None:
            following.append(wrapped)
    return [layer for layer in layers if layer is not None]


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"an {kind}" if kind[0].lower() in "aeio" else f"a {kind}"


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


def _imported(given: Any) -> Any:
    """Return what a text names as "package.module:name"; anything else as it is."""
    if not isinstance(given, str):
        return given
    module, _, name = given.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidRoute(f"the app object names {given[:200]!r}, as package.module:name: {error}") from error
