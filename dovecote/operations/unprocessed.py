"""What each handler has before it, counted from its low-water mark: exact, however long the history is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from dovecote.route import Route

# Counting stops here. 20,000 events take some 50 ms.
_BOUND = 20_000
# Where no mark can help yet, so many of the newest events are looked at.
_NEWEST_EVENTS = 2_000


@dataclass(frozen=True)
class Unprocessed:
    """Events that a handler wants and has not acted on, without those in `deliveries`.

    oldest    when the first of them was written; None for none
    at_least  there may be more
    """

    events: int
    oldest: datetime | None
    at_least: bool


_FROM_MARK = text(
    """
    select u.events, u.oldest, u.at_least
    from dovecote.progress p
    cross join lateral dovecote.unprocessed(p.handler_name, :bound, cast(:event_types as text[])) u
    where p.handler_name = :handler
    """
)

# Types that no leading relay has subscribed the handler to yet, nor to another version of them.
_UNKNOWN = text(
    """
    select w.handler_name, w.event_type
    from unnest(cast(:handlers as text[]), cast(:event_types as text[])) as w (handler_name, event_type)
    where not exists (select from dovecote.wanted_since(array[w.handler_name], array[w.event_type]))
    """
)

# Queues are first in, first out: what is still under way is among the newest, unless a handler is far behind.
_NEWEST = text(
    """
    with newest as materialized (
        select id, position, event_type, created_at from dovecote.outbox order by position desc limit :newest
    ), reach as (
        select count(*) = :newest as is_bounded, min(position) + (max(position) - min(position)) / 10 as oldest_tenth
        from newest
    )
    select w.handler_name, count(*) as events, min(n.created_at) as oldest,
           bool_or(reach.is_bounded and n.position <= reach.oldest_tenth) as may_be_more
    from newest n
    join unnest(cast(:handlers as text[]), cast(:event_types as text[])) as w (handler_name, event_type)
        on w.event_type = n.event_type
    left join dovecote.subscriptions s on s.handler_name = w.handler_name and s.event_type = w.event_type
    cross join reach
    where n.position > coalesce(s.since_position, 0)
      and (s.published_above is null or not s.published_above @> n.position)
      and not exists (select from dovecote.processed_events p
                      where p.event_id = n.id and p.handler_name = w.handler_name)
      and not exists (select from dovecote.deliveries d where d.event_id = n.id and d.handler_name = w.handler_name)
    group by w.handler_name
    """
)


def unprocessed(connection: Connection, routes: Sequence[Route]) -> dict[str, Unprocessed]:
    """Return what each handler has before it, by name."""
    marked = {route.handler: row for route in routes if (row := _from_mark(connection, route))}
    wanted = [(route.handler, event_type) for route in routes for event_type in route.event_types]
    unknown = {tuple(row) for row in connection.execute(_UNKNOWN, _as_arrays(wanted))}
    # A history that is not examined yet, or a backlog beyond the bound: among the newest may be more than was found.
    newest = _newest(
        connection,
        [(handler, kind) for handler, kind in wanted if (handler, kind) in unknown or _is_cut(marked.get(handler))],
    )
    found = {}
    for route in routes:
        row, beside = marked.get(route.handler), newest.get(route.handler)
        oldest = [one.oldest for one in (row, beside) if one and one.oldest]
        known, new = row.events if row else 0, beside.events if beside else 0
        found[route.handler] = Unprocessed(
            events=max(known, new) if _is_cut(row) else known + new,
            oldest=min(oldest, default=None),
            at_least=_is_cut(row) or bool(beside and beside.may_be_more),
        )
    return found


def _is_cut(row: Any) -> bool:
    return bool(row and row.at_least)


def _from_mark(connection: Connection, route: Route) -> Any:
    parameters = {"handler": route.handler, "event_types": route.event_types, "bound": _BOUND}
    return connection.execute(_FROM_MARK, parameters).one_or_none()


def _newest(connection: Connection, wanted: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
    if not wanted:
        return {}
    found = connection.execute(_NEWEST, {**_as_arrays(wanted), "newest": _NEWEST_EVENTS})
    return {row.handler_name: row for row in found}


def _as_arrays(wanted: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    return {"handlers": [handler for handler, _ in wanted], "event_types": [kind for _, kind in wanted]}
