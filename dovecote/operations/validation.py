"""What an operator may ask for, whichever way it is asked. Every verb refuses nonsense in words before it looks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

import psycopg
from psycopg import errors
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from dovecote.errors import DovecoteError, WrongRequest
from dovecote.route import Route

__all__ = [
    "BadCursor",
    "NoActor",
    "NoReason",
    "NotPermitted",
    "WrongRequest",
    "changing",
    "require_aggregate_type",
    "require_handler",
    "require_range",
    "require_who_and_why",
]

# Ids hold a time from 1970 on; an earlier year is a typing error.
_NOTHING_BEFORE = datetime(2000, 1, 1, tzinfo=UTC)


class NoReason(WrongRequest):
    """An irreversible change needs a reason, and none was given."""


class NoActor(WrongRequest):
    """Nobody said who does this, and the audit log must know."""


class BadCursor(WrongRequest):
    """What was given to go on from is not what a page gave."""


class NotPermitted(DovecoteError):
    """The login lacks a role; the message names both."""


@contextmanager
def changing(engine: Engine, refused: type[DovecoteError]) -> Iterator[Connection]:
    """Give a transaction that calls a verb's function; the database's answer, if it is no, in words.

    Errors: WrongRequest, NotPermitted; `refused` where things are not so that it can be done.
    """
    with engine.connect() as connection:
        try:
            with connection.begin():
                yield connection
        except DBAPIError as error:
            cause = error.orig
            if not isinstance(cause, psycopg.Error):
                raise
            if isinstance(cause, errors.InvalidParameterValue):
                raise WrongRequest(cause.diag.message_primary or str(cause)) from error
            if isinstance(cause, errors.ObjectNotInPrerequisiteState):
                raise refused(cause.diag.message_primary or str(cause)) from error
            if isinstance(cause, errors.LockNotAvailable):
                raise refused("somebody else is changing the same and has not finished; try again") from error
            if isinstance(cause, errors.InsufficientPrivilege):
                login = engine.url.username
                raise NotPermitted(
                    f"login {login} may not do this: grant dovecote_operator to it ({cause.diag.message_primary})"
                ) from error
            raise


def require_range(since: datetime | None, until: datetime | None) -> None:
    """Errors: WrongRequest for a range that ends before it begins, or of a time when there were no events."""
    for time in (since, until):
        if time is not None and time < _NOTHING_BEFORE:
            raise WrongRequest(f"{time:%Y-%m-%d} is before there were events: a year has four digits, such as 2026")
    if since is not None and until is not None and since >= until:
        raise WrongRequest(f"the range of time ends ({until}) before it begins ({since})")


def require_aggregate_type(aggregate_type: str | None, aggregate_id: str | None) -> None:
    """Errors: WrongRequest for an id alone: another type may use the same one."""
    if aggregate_id is not None and aggregate_type is None:
        raise WrongRequest("an aggregate's id needs its type too: --aggregate-type")


def require_handler(handler: str | None, routes: Sequence[Route]) -> None:
    """Errors: WrongRequest for a handler that no route has. Nothing is not the answer to a slip of the finger."""
    handlers = sorted(route.handler for route in routes)
    if handler is not None and handlers and handler not in handlers:
        raise WrongRequest(f"there is no handler {handler!r}; there are {', '.join(handlers)}")


def require_who_and_why(actor: str, reason: str | None, *, why: str | None = None) -> None:
    """Errors: NoActor; NoReason where the verb needs one, which `why` says."""
    if not actor.strip():
        raise NoActor("who does this? The audit log wants a name")
    if why is not None and not (reason or "").strip():
        raise NoReason(why)
