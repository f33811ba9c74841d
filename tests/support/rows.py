"""A table of a service's own, and what a test asks of it and of the outbox."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dovecote.unit_of_work import UnitOfWork
from tests.support.quotes import a_quote

Transact = Callable[[Any, Callable[[Session], object]], None]


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "rows_of_theirs"
    __table_args__ = {"schema": "public"}  # noqa: RUF012 - SQLAlchemy's own form
    name: Mapped[str] = mapped_column(primary_key=True)
    note: Mapped[str] = mapped_column(default="", server_default="")


def written(engine: Engine) -> list[str]:
    """The symbols of the events in the outbox, in order."""
    with engine.connect() as connection:
        return list(connection.scalars(text("select aggregate_id from dovecote.outbox order by position")))


def state(engine: Engine) -> set[str]:
    """The names of the rows that were not there before."""
    with engine.connect() as connection:
        return set(connection.scalars(select(Row.name))) - {"to change", "to delete"}


def emit(session: Session | None, symbol: str) -> None:
    assert session is not None
    UnitOfWork(session).emit(a_quote(symbol))
