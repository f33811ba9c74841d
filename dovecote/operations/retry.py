"""What operators do about failures: send again at once, or give up. Waiting events follow the one they wait for.

The database does it, batch by batch, each with its line in the audit log (migration 0029).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine, text

from dovecote.errors import DovecoteError
from dovecote.operations.deliveries import ROW, Failure, Filter, failure
from dovecote.operations.validation import changing, require_handler, require_range, require_who_and_why
from dovecote.route import Route
from dovecote.store.unsendable import EventIsGone

# Rows of one transaction, and the most that the functions take: it holds their locks for some 200 ms.
_BATCH = 5_000


class CannotChange(DovecoteError):
    """The delivery is in no state for this; the message says what to do instead."""


@dataclass(frozen=True)
class Change:
    """What a retry or a discard did, or would do.

    affected  deliveries changed; in a dry run, the exact number that would be
    busy      deliveries left alone because a worker was trying them at that moment
    released  events that waited behind what was discarded and are on their way now
    sample    some of them
    """

    verb: str
    dry_run: bool
    affected: int
    busy: int
    released: int
    sample: list[Failure]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_COUNT = text("select asked_at, states, matching from dovecote.count_changeable(:verb, cast(:filter as jsonb))")
# The same deliveries that the verb's function changes.
_CHANGEABLE = "dovecote.is_changeable(d, :verb, cast(:filter as jsonb), cast(:states as text[]))"
_SAMPLE = text(
    f"select {ROW} from dovecote.deliveries d where {_CHANGEABLE} order by d.position desc limit 5"  # noqa: S608 - put together from constants
)
_BUSY = text(
    f"select count(*) from dovecote.deliveries d where {_CHANGEABLE} and d.updated_at <= :began"  # noqa: S608 - put together from constants
)
_ASKED = "(:actor, :reason, cast(:filter as jsonb), :began, :batch)"
_CHANGE = {
    "retry": text(f"select affected, released from dovecote.retry_deliveries{_ASKED}"),  # noqa: S608 - put together from constants
    "discard": text(f"select affected, released from dovecote.discard_deliveries{_ASKED}"),  # noqa: S608 - put together from constants
}


def retry(
    engine: Engine,
    wanted: Filter,
    *,
    actor: str,
    reason: str | None = None,
    dry_run: bool = False,
    routes: Sequence[Route] = (),
) -> Change:
    """Send dead deliveries again at once, with all of their route's attempts before them.

    With a state of `retrying` in the filter: those that wait for their next attempt, at once. Those that are dead
    because their event is gone stay as they are, unless it is back.
    Errors: WrongRequest; NotThere and CannotChange for a single one.
    """
    require_who_and_why(actor, reason)
    return _change(engine, wanted, "retry", actor, reason, dry_run, routes)


def discard(
    engine: Engine, wanted: Filter, *, actor: str, reason: str, dry_run: bool = False, routes: Sequence[Route] = ()
) -> Change:
    """Give deliveries up for good; what waited behind them goes on in order.

    Dead ones, or with that state in the filter, retrying ones that have been tried at least once. Of a handler that no
    route has: with their state in the filter, all retrying and waiting ones.
    Errors: WrongRequest; NotThere and CannotChange for a single one.
    """
    require_who_and_why(actor, reason, why="a discard needs a reason: what is given up is not done by anybody later")
    return _change(engine, wanted, "discard", actor, reason, dry_run, routes)


def _change(
    engine: Engine,
    wanted: Filter,
    verb: str,
    actor: str,
    reason: str | None,
    dry_run: bool,
    routes: Sequence[Route],
) -> Change:
    require_range(wanted.since, None)
    asked = wanted.as_json()
    if verb == "discard" and routes and wanted.handler not in {None, *(route.handler for route in routes)}:
        # Nobody acts on what comes after, so all of it can be given up.
        asked["without_route"] = True
    parameters: dict[str, Any] = {"verb": verb, "filter": json.dumps(asked)}
    with changing(engine, CannotChange) as connection:
        began, states, matching = connection.execute(_COUNT, parameters).one()
        parameters["states"] = states
        sample = [Failure(**row._mapping) for row in connection.execute(_SAMPLE, parameters)]
    if wanted.event_id is not None and not matching:
        _explain(engine, wanted, verb)
    if not matching:
        require_handler(wanted.handler, routes)
    if dry_run:
        return Change(verb, True, matching, 0, 0, sample)
    parameters |= {"actor": actor, "reason": reason, "began": began, "batch": _BATCH}
    affected = released = 0
    while True:
        with changing(engine, CannotChange) as connection:
            done = connection.execute(_CHANGE[verb], parameters).one()
        affected += done.affected
        released += done.released
        if done.affected < _BATCH:
            break
    with engine.connect() as connection:
        busy = connection.execute(_BUSY, parameters).scalar_one()
    if wanted.event_id is not None and not affected:
        _explain(engine, wanted, verb)
    return Change(verb, False, affected, busy, released, sample)


def _explain(engine: Engine, wanted: Filter, verb: str) -> None:
    """Say why a single one was left as it is. Errors: NotThere, CannotChange."""
    assert wanted.handler is not None, "a single delivery is named by handler and event"
    assert wanted.event_id is not None
    story = failure(engine, (), wanted.handler, wanted.event_id)
    advice = {
        "waiting": f"it waits behind an earlier event of {story.delivery.aggregate_type} "
        f"{story.delivery.aggregate_id}: {verb} that one (`dovecote aggregates blocked`)",
        "discarded": "it was given up; a replay sends it again",
        "retrying": "it has not been tried yet; wait for its first attempt",
        "dead": "somebody else changed it at this moment; look again",
    }[story.delivery.state]
    if verb == "retry" and story.delivery.error_type == EventIsGone.__qualname__:
        advice = (
            "the event is not in the outbox any more, so nobody can act on it: discard it, or put the row back there "
            "with this id and retry"
        )
    raise CannotChange(f"{wanted.handler} {wanted.event_id} is {story.delivery.state}: {advice}")
