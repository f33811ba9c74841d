"""What a route must be, said when it is made: what breaks these rules would be found out by lost events.

A name is written into Redis keys, into JSON by hand, and into rows: plain words everywhere.
"""

import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dovecote.errors import DovecoteError
from dovecote.events import Event

_MAX_NAME_LENGTH = 200
_NAME = re.compile(r"[A-Za-z0-9_.:-]+")
# Dramatiq's rule for a queue.
_QUEUE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# Dramatiq's and our own, for what belongs to a queue: messages that wait, are dead, are at work, were in a
# crash, are put aside.
_SUFFIXES = (".DQ", ".XQ", ".msgs", ".at_work", ".crashes")
_ASIDE = ".aside."
# The broker's own keys: __relay__, __heartbeats__, __acks__.
_OWN = "__"

_AWAIT = "make it a `def`, and run what must be awaited with asyncio.run(...)"
_NO_YIELD = "make it a function without `yield`"


class InvalidRoute(DovecoteError, ValueError):
    """A route that could never work as it is written."""


class ReturnedValue(DovecoteError):
    """A handler returned something, which nobody looks at: what it meant to do with it was not done."""


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
    if name.startswith(_OWN) or name.endswith(_SUFFIXES) or _ASIDE in name:
        raise InvalidRoute(
            f"queue {name!r} would share keys in Redis with something else: "
            f"no name may begin with {_OWN}, end in {', '.join(_SUFFIXES)} or contain {_ASIDE}"
        )


def require_callable(handler: str, act: object) -> None:
    """Errors: InvalidRoute for what cannot be called as function(event, uow, gateways) and be done when it returns."""
    if inspect.isclass(act):
        raise InvalidRoute(f"{handler}: its act is the class {act.__name__}; give a function, or an instance's method")
    if not callable(act):
        raise InvalidRoute(f"{handler}: its act is {_shown(act)}, which cannot be called; give a function")
    for function in _layers(act):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise InvalidRoute(
                f"{handler}: its act is an `async def`, and nobody would await it: {_AWAIT}. A function around it that "
                "does so already must not say that it wraps it (functools.wraps sets __wrapped__)"
            )
        if inspect.isgeneratorfunction(function):
            raise InvalidRoute(f"{handler}: its act is a generator, whose body would never run: {_NO_YIELD}")
    try:
        signature = inspect.signature(act, follow_wrapped=False)
    except (ValueError, TypeError):
        return  # a function of C without a signature: it says so itself when it is called
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise InvalidRoute(
            f"{handler}: its act is called with three arguments, (event, uow, gateways) "
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


def _layers(act: Any) -> list[object]:
    """Return the callable and what it calls, through partials, bound methods, wrappers and `__call__`."""
    layers: list[object] = []
    following: list[Any] = [act]
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
