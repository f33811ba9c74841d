"""Since which position each handler is subscribed to each event type."""

from collections.abc import Sequence

from dovecote.route import Route
from dovecote.store import relay_state
from dovecote.store.envelopes import Connection

# A new handler gets what is not published yet: all above the checkpoint, without exactly what is in a batch. A version
# of an event that the handler is subscribed to already counts since then: it may have been written before we knew it.
SUBSCRIBE = """
    with published (above) as (
        select coalesce(range_agg(positions), '{}') * int8multirange(int8range(%(checkpoint)s, null, '()'))
        from dovecote.published_batches
        where positions && int8multirange(int8range(%(checkpoint)s, null, '()'))
          and not lower_inf(positions) and not upper_inf(positions)
    )
    insert into dovecote.subscriptions (handler_name, event_type, since_position, published_above, routed_epoch,
                                        replayable, ordered)
    select wanted.handler_name, wanted.event_type, coalesce(before.since_position, %(checkpoint)s),
           coalesce(before.published_above, published.above), %(epoch)s, wanted.replayable, wanted.ordered
    from unnest(%(handlers)s::text[], %(event_types)s::text[], %(replayable)s::boolean[], %(ordered)s::boolean[])
        as wanted (handler_name, event_type, replayable, ordered)
    cross join published
    left join lateral (
        select s.since_position, s.published_above from dovecote.subscriptions s
        where s.handler_name = wanted.handler_name
          and dovecote.event_name(s.event_type) = dovecote.event_name(wanted.event_type)
        order by s.since_position limit 1
    ) before on true
    on conflict (handler_name, event_type) do update
    set routed_epoch = excluded.routed_epoch, replayable = excluded.replayable, ordered = excluded.ordered
"""
# The leader before us had older code: it did not route one of our types, and has skipped events of it.
_WERE_SKIPPED = """
    select exists (
        select from unnest(%(handlers)s::text[], %(event_types)s::text[]) as wanted (handler_name, event_type)
        join dovecote.subscriptions known on known.handler_name = wanted.handler_name
            and dovecote.event_name(known.event_type) = dovecote.event_name(wanted.event_type)
        left join dovecote.subscriptions own on own.handler_name = wanted.handler_name
            and own.event_type = wanted.event_type
        where own.routed_epoch is distinct from %(epoch)s - 1
    )
"""


def subscribe(connection: Connection, routes: Sequence[Route], epoch: int, checkpoint: int) -> bool:
    """Record since when each handler is subscribed to each of its types; known subscriptions stay.

    Return whether leaders before us may have skipped events of these types: then no Redis is known to hold them.
    """
    wanted = [(route, event_type) for route in routes for event_type in route.event_types]
    parameters = {
        "epoch": epoch,
        "checkpoint": checkpoint,
        "handlers": [route.handler for route, _ in wanted],
        "event_types": [event_type for _, event_type in wanted],
        "replayable": [route.replayable for route, _ in wanted],
        "ordered": [route.ordered for route, _ in wanted],
    }
    with connection.transaction():
        (were_skipped,) = connection.execute(_WERE_SKIPPED, parameters).fetchone() or (False,)
        connection.execute(SUBSCRIBE, parameters)
        if were_skipped:
            relay_state.forget_redis(connection, epoch)
    return bool(were_skipped)
