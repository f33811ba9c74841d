"""Looks events up in the outbox. Consumers act on nothing else, and write no delivery for anything else.

Postgres may have forgotten an event whose message is still queued: after a restore, or a failover that lost the last
commits. A message says in which run of Postgres the relay has read its events. Within one run nothing is forgotten that
was seen committed, so the same run is proof enough. Looked up are only the events of messages of another run, of
messages that name none, such as those of an older relay or made by hand, and of old messages: an intruder in Redis may
have kept a message, with its signature, until the week of its events was dropped, and with it the record of what was
done.

The look-up is part of the statement that records the events as processed, or that decides what is to be done with them.
Once per connection would not do: behind a transaction pooler a connection outlives the run.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import redis
import structlog
from sqlalchemy import text
from sqlalchemy.orm import Session

from dovecote.database import array, uuid_array
from dovecote.envelope import Envelope
from dovecote.errors import DovecoteError
from dovecote.route import Route
from dovecote.store.bundle import Bundle
from dovecote.store.connections import DURABLE, driver_connection
from dovecote.telemetry.instrumentation import ConsumerInstrumentation

log = structlog.get_logger()

_LAST_POSITION = 2**63 - 1
_MAX_HISTORY = 200
# The oldest event of a message must be younger for the run to be proof. A week is dropped when it is over, not at once.
_RECENT_SECONDS = 86_400
# The bits of an id after its time in milliseconds (dovecote/events/ids.py).
_BITS_AFTER_TIME = 80

# `run` also has the transaction commit durably: the message is acknowledged because of it. It is read in any
# case, by REST at least, and once: materialized.
LOOKED_UP = f"""
    with run (is_other, durable) as materialized (
        select dovecote.outbox_run() <> %(sent_in)s::text, {DURABLE}
    ), bundle as (
        select event_id from pg_catalog.unnest(%(event_ids)s::uuid[]) as bundle (event_id)
    ), absent (event_id) as materialized (
        select dovecote.not_in_outbox(%(event_ids)s::uuid[], %(positions)s::bigint[], %(event_types)s::text[])
        where (select is_other from run) is not false
    )"""  # noqa: S608 - put together from constants

# What is in `kept` is usually all: the rest is less to read. The row without an event says that the run is another.
REST = """
    select event_id, event_id in (select event_id from absent) from bundle
    where event_id not in (select event_id from kept)
    union all
    select null, null from run where is_other
"""

_LOOK_UP = f"""{LOOKED_UP}, kept as (
        select event_id from bundle where event_id not in (select event_id from absent)
    ) {REST}"""  # noqa: S608 - put together from constants

_HISTORY = text("select history from dovecote.relay_state")


class OtherHistory(DovecoteError):
    """This database is not the one that the relay reads."""

    def __init__(self, here: str, in_redis: str) -> None:
        super().__init__(
            f"this database is in another history ({here}) than the messages in Redis ({in_redis}): the relay reads "
            "another one, because this primary was replaced; point DATABASE_URL to the one that the relay reads"
        )


@dataclass(frozen=True)
class Found:
    """Of a bundle: what is `to_do`, and what is `absent` from the outbox. The rest is not for this message to do.

    `of_other_run`: the relay has read the events in another run of Postgres, or in another Postgres.
    """

    to_do: list[Envelope]
    absent: list[Envelope]
    of_other_run: bool = False


def parameters(bundle: Bundle) -> dict[str, object]:
    """Return the parameters of LOOKED_UP."""
    events = _once_each(bundle)
    different = events.values()
    return {
        "event_ids": uuid_array(events),
        # What Postgres cannot even compare is no event's: made by hand, it must not fail its whole bundle.
        "positions": array(e.position if 0 < e.position <= _LAST_POSITION else 0 for e in different),
        "event_types": array(envelope.type.replace("\0", "\ufffd") for envelope in different),
        "sent_in": bundle.sent_in if _are_recent(events) else None,
    }


def found_in(rest: Iterable[tuple[Any, ...]], bundle: Bundle) -> Found:
    """Read the rows of REST."""
    reasons = dict(rest)
    of_other_run = reasons.pop(None, False) is None
    different = _once_each(bundle)
    return Found(
        [envelope for event_id, envelope in different.items() if event_id not in reasons],
        [envelope for event_id, envelope in different.items() if reasons.get(event_id)],
        of_other_run,
    )


def look_up(session: Session, bundle: Bundle) -> Found:
    """Return which events are in the outbox; the transaction then commits durably."""
    return found_in(driver_connection(session).execute(_LOOK_UP, parameters(bundle)), bundle)


def require_same_history(session: Session, found: Found, in_redis: Callable[[], str | None]) -> None:
    """Require the database that the relay reads: what is absent here may be present there.

    A consumer may be left behind on a primary that was replaced. An acknowledgement there would lose the event for the
    database that the relay reads. `in_redis` returns the history in which the messages in Redis were sent.
    Errors: OtherHistory; those of Redis.
    """
    if not found.absent and not found.of_other_run:
        return
    here, there = session.scalar(_HISTORY), in_redis()
    if here is not None and there is not None and here != there:
        raise OtherHistory(here, there)


def history_in(client: redis.Redis, namespace: str) -> str | None:
    """Return the history in which the messages in Redis were sent; None where no relay has recorded it yet."""
    key = f"{namespace}:__relay__.history"
    if int(client.hstrlen(key, "history")) > _MAX_HISTORY:  # no relay has written that
        return None
    found = client.hget(key, "history")
    return found.decode(errors="replace") if isinstance(found, bytes) else None


def report(route: Route, absent: Sequence[Envelope], instrumentation: ConsumerInstrumentation) -> None:
    """Count and log events that were skipped because they are not in the outbox."""
    if absent:
        instrumentation.phantoms(route.handler, len(absent))
    for envelope in absent:
        log.warning(
            "event is not in the outbox: postgres has lost it, or never had it; it is skipped",
            handler=route.handler,
            event_id=str(envelope.event_id),
            position=envelope.position,
        )


def _are_recent(event_ids: Iterable[UUID]) -> bool:
    oldest = min((event_id.int for event_id in event_ids), default=0) >> _BITS_AFTER_TIME
    return oldest > (time.time() - _RECENT_SECONDS) * 1_000


def _once_each(bundle: Bundle) -> dict[UUID, Envelope]:
    return {envelope.event_id: envelope for envelope in bundle.envelopes}
