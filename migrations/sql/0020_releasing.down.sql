drop function dovecote.due_deliveries, dovecote.message_bytes, dovecote.release_parked, dovecote.release_next, dovecote.release, dovecote.release_key;
-- The one before is the last that was not discarded. Discarding an event that itself waits says nothing of what it
-- waited for: what comes after it must go on waiting for that.
create or replace function dovecote.blocker(
    handler text, event_types text[], of_aggregate_type text, of_aggregate_id text, before_position bigint
) returns uuid
language sql stable as $$
    -- The event that an ordered handler must have done before this one; null when the way is free. It is enough
    -- to ask for the one before: if that is done, so is everything before it.
    select before.id
    from (
        select o.id
        from dovecote.outbox o
        left join dovecote.subscriptions s on s.handler_name = handler and s.event_type = o.event_type
        where o.aggregate_type = of_aggregate_type and o.aggregate_id = of_aggregate_id
          and o.position < before_position and o.event_type = any(event_types)
          and o.position > coalesce(s.since_position, 0)
          and not exists (select from dovecote.deliveries d
                          where d.event_id = o.id and d.handler_name = handler and d.state = 'discarded')
        order by o.position desc limit 1
    ) before
    where not exists (select from dovecote.processed_events p
                      where p.event_id = before.id and p.handler_name = handler)
$$;
alter function dovecote.blocker reset all;
