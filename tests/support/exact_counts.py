"""Exact counts over the whole history: as slow as it is long. For tests and for proofs, not for a screen."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, TextClause, text

from dovecote.route import Route


@dataclass(frozen=True)
class Counted:
    """Every event there is.

    unpublished   committed and in no batch
    processed     handler -> events it has acted on
    unprocessed   handler -> events it has neither acted on nor given up, published or not
    """

    unpublished: int
    published: int
    processed: dict[str, int]
    unprocessed: dict[str, int]

    @property
    def is_quiet(self) -> bool:
        """Everything committed is published, and acted on or given up."""
        return not self.unpublished and not any(self.unprocessed.values())


_UNPUBLISHED = text(
    """
    select count(*) from dovecote.outbox o, dovecote.relay_state s
    where o.position > s.checkpoint
      and not exists (select from dovecote.published_batches b where b.positions @> o.position)
    """
)
_PUBLISHED = text("select coalesce(sum(events), 0)::bigint from dovecote.published_batches")
_PROCESSED = text("select count(*) from dovecote.processed_events where handler_name = :handler")
_UNPROCESSED = text(
    """
    select count(*)
    from dovecote.outbox o
    left join dovecote.subscriptions s on s.handler_name = :handler and s.event_type = o.event_type
    where o.event_type = any(:event_types) and o.position > coalesce(s.since_position, 0)
      and (s.published_above is null or not s.published_above @> o.position)
      and not exists (select from dovecote.processed_events p
                      where p.event_id = o.id and p.handler_name = :handler)
      and not exists (select from dovecote.deliveries d where d.event_id = o.id and d.handler_name = :handler
                      and d.state in ('dead', 'discarded'))
    """
)


def count_everything(engine: Engine, routes: Sequence[Route]) -> Counted:
    """Count whole tables, from one snapshot."""
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:

        def count(query: TextClause, route: Route) -> int:
            parameters = {"handler": route.handler, "event_types": route.event_types}
            return int(connection.execute(query, parameters).scalar_one())

        return Counted(
            unpublished=connection.execute(_UNPUBLISHED).scalar_one(),
            published=connection.execute(_PUBLISHED).scalar_one(),
            processed={route.handler: count(_PROCESSED, route) for route in routes},
            unprocessed={route.handler: count(_UNPROCESSED, route) for route in routes},
        )
