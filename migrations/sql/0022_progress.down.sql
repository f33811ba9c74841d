drop trigger begin_progress on dovecote.subscriptions;
drop trigger widen_progress on dovecote.subscriptions;

-- Back to the functions of 0008, 0020 and 0021.

create or replace function dovecote.forget_handler(handler text, forgotten_by text) returns bigint
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp as $$
declare
    ended bigint;
begin
    delete from dovecote.subscriptions s where s.handler_name = handler;
    get diagnostics ended = row_count;
    if ended > 0 then
        insert into dovecote.audit_log (actor, action, details)
        values (forgotten_by, 'handler.forgotten', jsonb_build_object('handler', handler, 'subscriptions', ended));
    end if;
    return ended;
end $$;

create or replace function dovecote.week_obstacles(lower_id uuid, upper_id uuid)
returns table (handler_name text, obstacle text, events bigint, example uuid)
language sql stable as $$
    -- Everything that somebody may still want to do with events of these ids. A replay is taken to want all
    -- of them until it has passed them.
    with
    last as (select o.position from dovecote.outbox o where o.id >= lower_id and o.id < upper_id
             order by o.position desc limit 1),
    unpublished as (
        select null::text, 'unpublished'::text, count(*), min(o.id::text)::uuid
        from dovecote.outbox o
        where o.id >= lower_id and o.id < upper_id
          and o.position > (select checkpoint from dovecote.relay_state)
        having count(*) > 0
    ),
    failed as (
        select d.handler_name, d.state, count(*), min(d.event_id::text)::uuid
        from dovecote.deliveries d
        where d.event_id >= lower_id and d.event_id < upper_id and d.state <> 'discarded'
        group by d.handler_name, d.state
    ),
    unprocessed as (
        select s.handler_name, 'unprocessed'::text, count(*), min(o.id::text)::uuid
        from dovecote.outbox o
        join dovecote.subscriptions s on s.event_type = o.event_type and o.position > s.since_position
             and not s.published_above @> o.position
        where o.id >= lower_id and o.id < upper_id
          and not exists (select from dovecote.processed_events p
                          where p.event_id = o.id and p.handler_name = s.handler_name
                            and p.event_id >= lower_id and p.event_id < upper_id)
          and not exists (select from dovecote.deliveries d
                          where d.event_id = o.id and d.handler_name = s.handler_name)
        group by s.handler_name
    ),
    -- A version that nobody subscribes to, of a fact that somebody does: newer code will ask for it.
    facts as (
        select distinct on (1, 2) s.handler_name, dovecote.fact_of(s.event_type) as fact, s.since_position,
               s.published_above
        from dovecote.subscriptions s order by 1, 2, 3
    ),
    unknown as (
        select f.handler_name, 'unknown version'::text, count(*), min(o.id::text)::uuid
        from dovecote.outbox o
        join facts f on f.fact = dovecote.fact_of(o.event_type) and o.position > f.since_position
             and not f.published_above @> o.position
        where o.id >= lower_id and o.id < upper_id
          and not exists (select from dovecote.subscriptions s
                          where s.handler_name = f.handler_name and s.event_type = o.event_type)
        group by f.handler_name
    ),
    replayed as (
        select r.handler_name, 'replay'::text, count(*), min(r.id::text)::uuid
        from dovecote.replays r, last
        where r.state in ('pending', 'running', 'paused') and r.cursor_position < last.position
        group by r.handler_name
    )
    select * from unpublished union all select * from failed union all select * from unprocessed
    union all select * from unknown union all select * from replayed
$$;

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
          and (s.published_above is null or not s.published_above @> o.position)
          and not exists (select from dovecote.deliveries d
                          where d.event_id = o.id and d.handler_name = handler and d.state = 'discarded')
        order by o.position desc limit 1
    ) before
    where not exists (select from dovecote.processed_events p
                      where p.event_id = before.id and p.handler_name = handler)
$$;

create or replace function dovecote.blockers(
    handler text, event_types text[], event_ids uuid[], aggregate_types text[], aggregate_ids text[], positions bigint[]
) returns table (event_id uuid, blocker uuid)
language sql stable
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
as $$
    select event.id, before.id
    from unnest(event_ids, aggregate_types, aggregate_ids, positions) as event (id, aggregate_type, aggregate_id, position)
    cross join lateral (
        select o.id
        from dovecote.outbox o
        left join dovecote.subscriptions s on s.handler_name = handler and s.event_type = o.event_type
        where o.aggregate_type = event.aggregate_type and o.aggregate_id = event.aggregate_id
          and o.position < event.position and o.event_type = any(event_types)
          and o.position > coalesce(s.since_position, 0)
          and (s.published_above is null or not s.published_above @> o.position)
          -- By its key: asked for by one value, any index that begins with the handler would seem as good.
          and (select d.state from dovecote.deliveries d
               where d.handler_name = handler and d.event_id >= o.id and d.event_id <= o.id
               order by d.event_id limit 1) is distinct from 'discarded'
        order by o.position desc limit 1
    ) before
    where (select p.event_id from dovecote.processed_events p
           where p.event_id = before.id and p.handler_name = handler) is null
$$;

drop function dovecote.settled_upto, dovecote.reopen_progress, dovecote.widen_progress, dovecote.begin_progress, dovecote.open_progress,
              dovecote.unprocessed, dovecote.move_marks, dovecote.look_again, dovecote.absent, dovecote.unsettled_of,
              dovecote.events_in, dovecote.coarser, dovecote.wanted_since, dovecote.progress_key;
drop table dovecote.progress;
