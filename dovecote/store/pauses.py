"""Handlers that an operator has paused: the table `paused_handlers`, and what a consumer does with their messages.

A paused handler's messages are held in Redis, each by the consumer that fetches it, and return to their queue in order
when it is resumed (broker/lua/hold.lua, broker/lua/resume_held.lua). A pause is in force from its commit on, and costs
nothing while there is none: the statements that look for work find none for a paused handler.
"""

import psycopg
from psycopg.rows import TupleRow
from sqlalchemy import text
from sqlalchemy.orm import Session

from dovecote.errors import DovecoteError

#: The relay listens to this channel: a handler was paused or resumed.
CHANNEL = "dovecote_handlers"

_IS_PAUSED = text("select exists (select from dovecote.paused_handlers where handler_name = :handler_name)")


class HandlerPaused(DovecoteError):
    """The handler is paused: its message is held until it is resumed."""


def require_not_paused(session: Session, handler_name: str) -> None:
    """Distinguish "nothing to do" from "paused": the statements that look for work find nothing in both cases.

    Errors: HandlerPaused.
    """
    if session.scalar(_IS_PAUSED, {"handler_name": handler_name}):
        raise HandlerPaused(handler_name)


def paused_handlers(connection: psycopg.Connection[TupleRow]) -> set[str]:
    """Return the handlers that are paused."""
    return {name for (name,) in connection.execute("select handler_name from dovecote.paused_handlers")}
