"""A transactional outbox: what a service commits in Postgres reaches every handler exactly once.

Everything that a service needs is here; importing it needs SQLAlchemy and nothing else.
"""

import os
import sys


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

from dovecote.errors import (  # noqa: E402 - only now nothing is imported from where the process was started
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
from dovecote.events import Event, readable_as, sensitive, upcaster  # noqa: E402 - see above
from dovecote.events.money import Money  # noqa: E402 - see above
from dovecote.privacy import Keyring  # noqa: E402 - see above
from dovecote.route import Dovecote, Route  # noqa: E402 - see above
from dovecote.unit_of_work import UnitOfWork, run_unit_of_work, unit_of_work  # noqa: E402 - see above

__all__ = [
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
