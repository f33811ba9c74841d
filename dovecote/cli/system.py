"""What commands work on: settings, the routes of the application, the database.

The help of a command needs none of them, so they are imported when a command is called.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dovecote.settings.application import find_app

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from dovecote.route import Route
    from dovecote.settings import Settings


def settings(*, needs_redis: bool = True) -> "Settings":
    """Return the settings of this process."""
    from dovecote.settings import load_settings

    return load_settings(needs_redis=needs_redis)


def routes() -> "Sequence[Route]":
    """Return the routes of the application that DOVECOTE_APP names."""
    return find_app().routes


@contextmanager
def database(given: "Settings | None" = None) -> "Iterator[Engine]":
    """Yield an engine for the length of a command; without settings, those of this process, Redis or not."""
    from dovecote.store.engines import engine_during

    with engine_during(given or settings(needs_redis=False)) as engine:
        yield engine
