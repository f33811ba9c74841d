"""Which errors are trouble that passes, as opposed to a handler's failure. No attempt is spent on them."""

import psycopg
import redis
import sqlalchemy.exc

from dovecote.telemetry.failures import TimeLimitExceeded, causes
from dovecote.unit_of_work import is_conflict

# SQLSTATE classes and codes, PostgreSQL manual, appendix A: connection trouble (08), no resources (53),
# shutdown, crash, start-up, idle for too long (57P0x, 25P03), read-only after a failover.
_CLASSES = ("08", "53")
_CODES = {"57P01", "57P02", "57P03", "57P05", "25P03", "25006"}


def passes(error: BaseException) -> bool:
    """Return whether the error, or one it came from, says that a server is away."""
    if any(isinstance(cause, TimeLimitExceeded) for cause in causes(error)):
        return False  # a connection that breaks when a handler is cut off says nothing of its server
    if any(isinstance(cause, psycopg.errors.TransactionTimeout) for cause in causes(error)):
        return False  # our sessions have none: a handler has set one, and it would be too long the next time as well
    return any(_is_passing(cause) for cause in causes(error))


def asks_again(error: BaseException) -> bool:
    """Return whether two transactions were in each other's way: the same work may succeed at once."""
    return any(is_conflict(cause) or _is_locked_out(cause) for cause in causes(error))


def _is_locked_out(error: BaseException) -> bool:
    return isinstance(error, psycopg.errors.LockNotAvailable)


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, sqlalchemy.exc.TimeoutError | redis.ConnectionError | redis.TimeoutError):
        return True
    if isinstance(error, sqlalchemy.exc.DBAPIError) and error.connection_invalidated:
        return True
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:  # the connection broke before the server could say why
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate.startswith(_CLASSES) or error.sqlstate in _CODES
