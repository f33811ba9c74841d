"""A transactional outbox: what a service commits in Postgres reaches every handler exactly once.

Everything that a service needs is here; importing it needs SQLAlchemy and nothing else.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING


def _forget_current_directory() -> None:
    """Take the current directory out of sys.path where `python -m` or Dramatiq has put it in front.

    A stranger who may write there would run code in a process that holds keys. Procfile and `./dev` do not ask for
    it; this is for processes that are started by hand, and `--path .` or PYTHONPATH bring it back.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    asks_for_it = any(word.startswith(("--path", "-P")) for word in sys.argv)
    is_dramatiq = any(word.startswith("dovecote.bootstrap:") for word in sys.argv) and not asks_for_it
    # pathlib may be theirs
    here, root = os.path.realpath("."), os.path.realpath(f"{__path__[0]}/..")
    if here == root or not (module == ["dovecote"] or is_dramatiq):
        return
    sys.path[:] = [entry for entry in sys.path if entry not in ("", ".")]
    # `python -m` puts it there by its name, once, in front of what PYTHONPATH says.
    if module and not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) == here:
        del sys.path[0]


_forget_current_directory()

#: The public names, each imported when it is first used: a command that only prints its help needs none of them.
_MODULES = {
    "Command": "route",
    "ConcurrentChange": "errors",
    "DomainError": "errors",
    "Dovecote": "route",
    "DovecoteError": "errors",
    "Event": "events",
    "GatewayUnavailable": "errors",
    "InvalidEvent": "errors",
    "InvalidValue": "errors",
    "Keyring": "privacy",
    "Money": "events.money",
    "NotFound": "errors",
    "RateLimited": "errors",
    "Refused": "errors",
    "Route": "route",
    "UnitOfWork": "unit_of_work",
    "readable_as": "events",
    "run_unit_of_work": "unit_of_work",
    "sensitive": "events",
    "unit_of_work": "unit_of_work",
    "upcaster": "events",
}

if TYPE_CHECKING:
    from dovecote.errors import (
        ConcurrentChange,
        DomainError,
        DovecoteError,
        GatewayUnavailable,
        InvalidEvent,
        InvalidValue,
        NotFound,
        RateLimited,
        Refused,
    )
    from dovecote.events import Event, readable_as, sensitive, upcaster
    from dovecote.events.money import Money
    from dovecote.privacy import Keyring
    from dovecote.route import Command, Dovecote, Route
    from dovecote.unit_of_work import UnitOfWork, run_unit_of_work, unit_of_work
else:

    class _Package(ModuleType):
        """Gives `dovecote.unit_of_work` as the function, also where the module of that name was imported before."""

        @property
        def unit_of_work(self) -> object:
            return __getattr__("unit_of_work")

        @unit_of_work.setter
        def unit_of_work(self, _module: object) -> None:
            """The import system binds each submodule here; this one is found in sys.modules."""

    sys.modules[__name__].__class__ = _Package

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})


__all__ = [
    "Command",
    "ConcurrentChange",
    "DomainError",
    "Dovecote",
    "DovecoteError",
    "Event",
    "GatewayUnavailable",
    "InvalidEvent",
    "InvalidValue",
    "Keyring",
    "Money",
    "NotFound",
    "RateLimited",
    "Refused",
    "Route",
    "UnitOfWork",
    "readable_as",
    "run_unit_of_work",
    "sensitive",
    "unit_of_work",
    "upcaster",
]
