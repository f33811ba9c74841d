"""What is left of handlers that no route has any more: rows that wait for other code, and are in nobody's way."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine

from dovecote.operations.snapshot import snapshot
from dovecote.route import Route
from dovecote.store.delivery_state import DeliveryState

# Rows counted of each state: what has more says so.
_MAX_COUNTED = 10_000

#: Takes `routed`, the handlers that have a route, and `most`. The names come from the indexes alone.
WITHOUT_ROUTE = """
    with recursive failed (name) as (
        (select handler_name from dovecote.deliveries order by handler_name limit 1)
        union all
        select (select d.handler_name from dovecote.deliveries d where d.handler_name > failed.name
                order by d.handler_name limit 1) from failed where failed.name is not null
    ), known as (
        select name from failed where name is not null
        union select handler_name from dovecote.subscriptions
        union select handler_name from dovecote.paused_handlers
        union select handler_name from dovecote.postponed
    )
    select known.name,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'retrying' limit %(most)s) few) as retrying,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'waiting' limit %(most)s) few) as waiting,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'dead' limit %(most)s) few) as dead,
           (select count(*) from (select from dovecote.deliveries d where d.handler_name = known.name
                                  and d.state = 'discarded' limit %(most)s) few) as discarded,
           array(select s.event_type from dovecote.subscriptions s where s.handler_name = known.name order by 1)
               as event_types,
           exists (select from dovecote.paused_handlers p where p.handler_name = known.name) as is_paused,
           exists (select from dovecote.postponed p where p.handler_name = known.name) as is_postponed
    from known where known.name <> all(%(routed)s::text[]) order by known.name
"""


@dataclass(frozen=True)
class HandlerWithoutRoute:
    """What Postgres keeps for a handler that no route has.

    event_types  its subscriptions: what of these it has not processed keeps weeks from being dropped
    at_least     which counts of deliveries may be larger
    """

    name: str
    retrying: int
    waiting: int
    dead: int
    discarded: int
    event_types: list[str]
    is_paused: bool
    is_postponed: bool
    at_least: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def parameters(routes: Sequence[Route], most: int = _MAX_COUNTED) -> dict[str, Any]:
    """Return what WITHOUT_ROUTE takes."""
    return {"routed": [route.handler for route in routes], "most": most}


def handlers_without_route(engine: Engine, routes: Sequence[Route]) -> list[HandlerWithoutRoute]:
    """Return the handlers that Postgres knows and no route has, by name."""
    with snapshot(engine) as connection:
        rows = connection.exec_driver_sql(WITHOUT_ROUTE, parameters(routes)).all()
    return [
        HandlerWithoutRoute(
            **row._mapping,
            at_least=[state for state in DeliveryState if row._mapping[state] == _MAX_COUNTED],
        )
        for row in rows
    ]
