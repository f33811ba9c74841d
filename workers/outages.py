"""Which errors are trouble that passes, as opposed to a handler's failure. No attempt is spent on them."""

from collections.abc import Iterator

import psycopg
import redis
import sqlalchemy.exc

# SQLSTATE classes and codes, PostgreSQL manual, appendix A: connection trouble (08), no resources (53),
# shutdown, crash, start-up (57P0x), read-only after a failover, and the two that ask to be tried again.
_CLASSES = ("08", "53")
_CODES = {"57P01", "57P02", "57P03", "57P05", "25006", "40001", "40P01", "55P03"}


def passes(error: BaseException) -> bool:
    """Return whether the error, or one it came from, says that a server is away or asks to try again."""
    return any(_is_passing(cause) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


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
