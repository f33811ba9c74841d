"""Handlers that an operator has paused: the SQL that says so, and what a consumer does with their messages.

A paused handler's messages are put aside in Redis, each by the consumer that meets it, and go back to their queue in
order when it is resumed (lua/put_aside.lua, lua/take_back.lua). So a pause holds from its commit on, and costs
nothing while there is none: the statements that ask what is to be done find nothing for a paused handler.
"""

import psycopg
from psycopg.rows import TupleRow
from sqlalchemy import text
from sqlalchemy.orm import Session

from dovecote.errors import DovecoteError

#: The relay listens to it: a handler was paused or resumed.
CHANNEL = "dovecote_handlers"

_is_paused = text("select exists (select from dovecote.paused_handlers where handler_name = :handler_name)")


class HandlerPaused(DovecoteError):
    """The handler is paused: its message is put aside until it is resumed."""


def require_at_work(session: Session, handler_name: str) -> None:
    """Tell "nothing to do" from "paused", which looks the same to the statements that ask what is new.

    Errors: HandlerPaused.
    """
    if session.scalar(_is_paused, {"handler_name": handler_name}):
        raise HandlerPaused(handler_name)


def paused_handlers(connection: psycopg.Connection[TupleRow]) -> set[str]:
    """Return the handlers that are paused."""
    return {name for (name,) in connection.execute("select handler_name from dovecote.paused_handlers")}
