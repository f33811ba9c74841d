"""Mistakes that handlers make: with which event, which mistake, and what is kept of its report.

A chosen event is mishandled until a failure of it has been reported; then its handler behaves. So a mistake that nobody
notices loses an effect, and one that nobody reports is seen as such.
"""

from collections.abc import Iterable
from contextlib import suppress
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

TABLES = """
create table chaos.reports (
    handler text not null, event_id uuid not null, error_type text, primary key (handler, event_id)
);
create function chaos.report() returns trigger language plpgsql as $$
begin
    if new.error is not null then
        insert into chaos.reports values (new.handler_name, new.event_id, new.error_type) on conflict do nothing;
    end if;
    return null;
end $$;
create trigger report after insert or update on dovecote.deliveries for each row execute function chaos.report();
"""

#: Handlers that make mistakes.
HANDLERS = ("chaos.careless", "chaos.careless_bulk")

# One event in so many is mishandled.
_ONE_IN = 40

_is_reported = text("select exists (select from chaos.reports where handler = :handler and event_id = :event_id)")


def _roll_back(session: Session) -> None:
    session.rollback()


def _swallow(session: Session) -> None:
    with suppress(DBAPIError):
        session.execute(text("select 1 / 0"))


def _commit(session: Session) -> None:
    with suppress(Exception):
        session.commit()


def _commit_in_sql(session: Session) -> None:
    with suppress(Exception):
        session.execute(text("commit; begin"))


def _close(session: Session) -> None:
    session.close()


def _set(session: Session) -> None:
    session.execute(text("set local lock_timeout = '1ms'"))


def _return_something(_session: Session) -> object:
    return "done"


_MISTAKES = (_roll_back, _swallow, _commit, _commit_in_sql, _close, _set, _return_something)


def is_mishandled(event_id: UUID) -> bool:
    """Return whether careless handlers make a mistake with the event. The last bits of a UUIDv7 are random."""
    return event_id.int % _ONE_IN == 0


def mishandle(handler: str, event_ids: Iterable[UUID], session: Session) -> object:
    """Make the mistake of the first event that has one and no report; return what the handler is to return."""
    for event_id in filter(is_mishandled, event_ids):
        if not session.scalar(_is_reported, {"handler": handler, "event_id": event_id}):
            return _MISTAKES[event_id.int // _ONE_IN % len(_MISTAKES)](session)
    return None
