"""The active rows of `replays`, as the relay reads and writes them.

A row may be written by a newer version, or by hand. The relay carries out what it understands and what the route
allows, even if the row was checked before; other rows it leaves as they are, and records why (`problem`).
"""

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import structlog
from psycopg.rows import class_row

from dovecote.route import Route
from dovecote.store.envelopes import Connection
from dovecote.store.replays import NotUnderstood, ReplaySelection, is_mode

log = structlog.get_logger()

_ACTIVE = """
    select id, handler_name, mode, filter, positions is not null as of_single_events, rate, cursor_position,
           upto_position, created_at, problem, upto_position > s.last_value as ends_in_future
    from dovecote.replays r, dovecote.outbox_position s where state in ('pending', 'running')
      and not exists (select from dovecote.paused_handlers h where h.handler_name = r.handler_name)
    order by id
"""

# Any login with the privilege may write a row: what is not understood is left, for a relay that understands it.
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


# Nothing is recorded by a relay that has been replaced, nor of a replay that has been paused or cancelled.
_RECORD = """
    update dovecote.replays r
    set cursor_position = %(cursor)s, done = done + %(events)s, updated_at = clock_timestamp(), problem = null,
        state = case when %(finished)s then 'done' else 'running' end,
        finished_at = case when %(finished)s then clock_timestamp() end
    from dovecote.relay_state s
    where r.id = %(replay)s and r.state in ('pending', 'running') and s.epoch = %(epoch)s
    returning r.total, r.done, r.handler_name
"""

_AUDIT_END = """
    insert into dovecote.audit_log (actor, action, affected, details)
    values ('relay', 'replay.done', %(done)s,
            jsonb_build_object('replay', %(replay)s::text, 'handler', %(handler)s::text,
            'total', %(total)s::bigint, 'done', %(done)s::bigint,
            'failed', (select count(*) from dovecote.deliveries where replay_id = %(replay)s)))
"""


class ReplayProgress(NamedTuple):
    """How many events of a replay are done, of how many."""

    total: int
    done: int


@dataclass(frozen=True)
class ActiveReplay:
    """A row of `replays` that is pending or running."""

    id: UUID
    handler_name: str
    mode: str
    filter: object
    of_single_events: bool
    rate: int | None
    cursor_position: int
    upto_position: int
    created_at: datetime
    problem: str | None = None
    ends_in_future: bool = False

    def understood(self, route: Route) -> ReplaySelection:
        """Return which events the replay selects. Errors: NotUnderstood, which names the field."""
        if not is_mode(self.mode):
            raise NotUnderstood(f"unknown mode {self.mode[:40]!a}")
        if self.rate is not None and self.rate < 1:
            raise NotUnderstood(f"its rate is {self.rate}, and is at least 1 event a second")
        if self.cursor_position < 0:
            raise NotUnderstood(f"its cursor is at position {self.cursor_position}")
        if self.ends_in_future:
            raise NotUnderstood(f"it ends at position {self.upto_position}, which no event has yet")
        asked = ReplaySelection.from_json(self.filter)
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
        """Return every active replay by its id, in the order of their requests."""
        with self._connection.cursor(row_factory=class_row(ActiveReplay)) as cursor:
            return {replay.id: replay for replay in cursor.execute(_ACTIVE)}

    def asked(self, replay: ActiveReplay, route: Route) -> ReplaySelection | None:
        """Return which events the replay selects; None where it must not run, for a reason that is recorded."""
        try:
            asked = replay.understood(route)
        except NotUnderstood as reason:
            self._leave(replay, str(reason))
            return None
        if replay.mode == "reprocess" and not route.replayable:
            self._refuse(replay, f"{route.handler} may not act again: {route.replay_note}")
            return None
        return asked

    def record(self, replay: UUID, cursor: int, events: int, *, finished: bool) -> ReplayProgress | None:
        """Record that a replay has finished so many more events, all up to the cursor.

        None if nothing was recorded: it was paused or cancelled, or another relay has taken over.
        """
        fields = {"replay": replay, "epoch": self._epoch, "cursor": cursor, "events": events, "finished": finished}
        row = self._connection.execute(_RECORD, fields).fetchone()
        if row is None:
            return None
        total, done, handler = row
        if finished:
            end = {"replay": replay, "handler": handler, "total": total, "done": done}
            self._connection.execute(_AUDIT_END, end)
        return ReplayProgress(total, done)

    def _leave(self, replay: ActiveReplay, problem: str) -> None:
        if self._left.get(replay.id) != problem:
            self._left[replay.id] = problem
            handler = replay.handler_name
            log.error("replay is not understood", replay=str(replay.id), handler=handler, why=problem)
        if replay.problem != problem:
            fields = {"replay": replay.id, "epoch": self._epoch, "problem": problem}
            self._connection.execute(_NOTE_PROBLEM, fields)

    def _refuse(self, replay: ActiveReplay, problem: str) -> None:
        log.error("replay is refused", replay=str(replay.id), handler=replay.handler_name, why=problem)
        self._connection.execute(_REFUSE, {"replay": replay.id, "epoch": self._epoch, "problem": problem})
