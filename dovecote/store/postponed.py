"""The table `postponed`: handlers with a full queue, and up to which position each was sent everything.

Nothing is written by a relay that has been replaced. It is written on the session that records batches: a crash of
Postgres that loses it loses the batch after it as well.
"""

from dovecote.store.envelopes import Connection, bounded
from dovecote.store.relay_state import OWNER, require_leader

_POSTPONED = "select handler_name, after_position from dovecote.postponed"
_POSTPONE = f"""
    with {OWNER}
    insert into dovecote.postponed (handler_name, after_position) select %(handler)s, %(position)s from owner
    on conflict (handler_name) do update set after_position = excluded.after_position
"""  # noqa: S608 - put together from constants
_ADVANCE = f"""
    with {OWNER}
    update dovecote.postponed set after_position = %(position)s from owner where handler_name = %(handler)s
"""  # noqa: S608 - as above
_END = f"with {OWNER} delete from dovecote.postponed using owner where handler_name = %(handler)s"  # noqa: S608 - as above

# Row by row through the keys, although the planner may believe that these tables are empty.
UNSENT = bounded("""
    select o.position, o.event_type, o.id, dovecote.small_envelope(o) as envelope
    from dovecote.outbox o
    cross join lateral (select since_position, published_above from dovecote.subscriptions
                        where handler_name = %s and event_type = o.event_type limit 1) s
    left join lateral (select true as there from dovecote.processed_events
                       where event_id = o.id and handler_name = %s limit 1) p on true
    left join lateral (select true as there from dovecote.deliveries
                       where event_id = o.id and handler_name = %s limit 1) d on true
    where o.position > %s and o.position <= %s and o.event_type = any(%s)
      and o.position > s.since_position and not s.published_above @> o.position
      and p.there is null and d.there is null
    order by o.position limit %s
""")


class PostponedHandlers:
    """The rows, as the leader of one epoch reads and writes them. Errors: NewerRelay, in what writes."""

    def __init__(self, connection: Connection, epoch: int) -> None:
        self._connection = connection
        self._epoch = epoch

    def after(self) -> dict[str, int]:
        """Return up to which position each postponed handler was sent everything."""
        return dict(self._connection.execute(_POSTPONED).fetchall())

    def postpone(self, handler: str, position: int) -> None:
        """Record that the handler was sent everything up to here, and is sent nothing above it for now."""
        self._write(_POSTPONE, handler, position)

    def advance(self, handler: str, position: int) -> None:
        """Record that the handler has caught up to here."""
        self._write(_ADVANCE, handler, position)

    def end(self, handler: str) -> None:
        """Record that the handler has caught up with the batches."""
        self._write(_END, handler, 0)

    def _write(self, statement: str, handler: str, position: int) -> None:
        fields = {"epoch": self._epoch, "handler": handler, "position": position}
        require_leader(self._epoch, self._connection.execute(statement, fields).rowcount)
