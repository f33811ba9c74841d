"""Checks of rows in our tables that no process of this version understands."""

from collections.abc import Sequence
from typing import Any

import psycopg

from dovecote.operations.doctor.finding import Finding, ok, warning
from dovecote.route import Route

_REPLAYS = """
    select id::text, left(handler_name, 200),
           coalesce(problem, case when handler_name <> all(%s) then 'no route has this handler' end) as problem
    from dovecote.replays
    where state in ('pending', 'running') and (problem is not null or handler_name <> all(%s))
    order by id limit 10
"""
_BATCHES = """
    select count(*) from (
        select from dovecote.published_batches
        where positions && int8multirange(int8range(null, 1), int8range(9223372036854775806, null))
          and (lower_inf(positions) or upper_inf(positions)) limit 1000) as few
"""


def replays(connection: psycopg.Connection[Any], routes: Sequence[Route]) -> Finding:
    """Replays that the relay has skipped."""
    handlers = [route.handler for route in routes]
    found = [
        f"replay {id} of {handler!a}: {problem}"
        for id, handler, problem in connection.execute(_REPLAYS, (handlers, handlers))
    ]
    if not found:
        return ok("rows.replays", "every active replay is understood")
    return warning(
        "rows.replays",
        "; ".join(found),
        "A newer relay may carry them out: deploy it. Otherwise `dovecote replay cancel ID` and ask anew.",
    )


def batches(connection: psycopg.Connection[Any]) -> Finding:
    """Whether anything but a relay has written into published_batches."""
    (odd,) = connection.execute(_BATCHES).fetchone() or (0,)
    if not odd:
        return ok("rows.batches", "every published batch has an end")
    return warning(
        "rows.batches",
        f"{odd} rows of published_batches have no end; relays pass them over, other figures may be wrong",
        "As the owner: delete from dovecote.published_batches where lower_inf(positions) or upper_inf(positions).",
    )
