"""Replays that are to be worked on, as their rows say, and what becomes of a row that says what is not understood.

A row may be written by a newer version, or by hand. The relay carries out what it understands and what the route
allows, whatever checked the row before; the rest it leaves as it is and says why (`problem`).
"""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import structlog
from psycopg.rows import class_row

from dovecote.route import Route
from dovecote.store.envelopes import Connection
from dovecote.store.replays import Filter, NotUnderstood, is_strength

log = structlog.get_logger()

_ACTIVE = """
    select id, handler_name, strength, filter, positions is not null as of_single_events, rate, cursor_position,
           upto_position, created_at, problem, upto_position > s.last_value as ends_in_future
    from dovecote.replays r, dovecote.outbox_position s where state in ('pending', 'running')
      and not exists (select from dovecote.paused_handlers h where h.handler_name = r.handler_name)
    order by id
"""

# The row is anybody's who may write replays: what is not understood is left as it is, for a relay that understands it.
_NOTE_PROBLEM = """
    update dovecote.replays r set problem = %(problem)s from dovecote.relay_state s
    where r.id = %(replay)s and r.problem is distinct from %(problem)s and s.epoch = %(epoch)s
"""
_REFUSE = """
    with refused as (
        update dovecote.replays r
        set state = 'cancelled', problem = %(problem)s, updated_at = clock_timestamp(), finished_at = clock_timestamp()
        from dovecote.relay_state s
        where r.id = %(replay)s and r.state in ('pending', 'running') and s.epoch = %(epoch)s
        returning r.id, r.handler_name, r.done, r.total
    )
    insert into dovecote.audit_log (actor, action, reason, affected, details)
    select 'relay', 'replay.refuse', %(problem)s, done,
           jsonb_build_object('replay', id, 'handler', handler_name, 'total', total, 'done', done)
    from refused
"""


@dataclass(frozen=True)
class ActiveReplay:
    """A row of `replays` that is to be worked on."""

    id: UUID
    handler_name: str
    strength: str
    filter: object
    of_single_events: bool
    rate: int | None
    cursor_position: int
    upto_position: int
    created_at: datetime
    problem: str | None = None
    ends_in_future: bool = False

    def understood(self, route: Route) -> Filter:
        """Return what is asked. Errors: NotUnderstood, in words that say which field."""
        if not is_strength(self.strength):
            raise NotUnderstood(f"unknown strength {self.strength[:40]!a}")
        if self.rate is not None and self.rate < 1:
            raise NotUnderstood(f"its rate is {self.rate}, and is at least 1 event a second")
        if self.cursor_position < 0:
            raise NotUnderstood(f"its cursor is at position {self.cursor_position}")
        if self.ends_in_future:
            raise NotUnderstood(f"it ends at position {self.upto_position}, which no event has yet")
        asked = Filter.from_json(self.filter)
        for event_type in asked.event_types or ():
            if event_type not in route.event_types:
                raise NotUnderstood(f"{route.handler} does not take {event_type[:200]!a}")
        return asked


class ActiveReplays:
    """Reads the rows for the relay of one epoch."""

    def __init__(self, connection: Connection, epoch: int) -> None:
        self._connection = connection
        self._epoch = epoch
        self._left: dict[UUID, str] = {}

    def rows(self) -> dict[UUID, ActiveReplay]:
        """Return every active replay by its id, in the order in which they were asked for."""
        with self._connection.cursor(row_factory=class_row(ActiveReplay)) as cursor:
            return {replay.id: replay for replay in cursor.execute(_ACTIVE)}

    def asked(self, replay: ActiveReplay, route: Route) -> Filter | None:
        """Return what the relay is to do; None where it must not: it has noted why."""
        try:
            asked = replay.understood(route)
        except NotUnderstood as reason:
            self._leave(replay, str(reason))
            return None
        if replay.strength == "again" and not route.replayable:
            self._refuse(replay, f"{route.handler} may not act again: {route.replay_note}")
            return None
        return asked

    def _leave(self, replay: ActiveReplay, problem: str) -> None:
        if self._left.get(replay.id) != problem:
            self._left[replay.id] = problem
            handler = replay.handler_name
            log.error("replay is not understood, and left alone", replay=str(replay.id), handler=handler, why=problem)
        if replay.problem != problem:
            fields = {"replay": replay.id, "epoch": self._epoch, "problem": problem}
            self._connection.execute(_NOTE_PROBLEM, fields)

    def _refuse(self, replay: ActiveReplay, problem: str) -> None:
        log.error("replay is refused", replay=str(replay.id), handler=replay.handler_name, why=problem)
        self._connection.execute(_REFUSE, {"replay": replay.id, "epoch": self._epoch, "problem": problem})
