drop trigger begin_progress on dovecote.subscriptions;
drop trigger widen_progress on dovecote.subscriptions;

-- Back to the functions of 0008 and 0020.

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

drop function dovecote.reopen_progress, dovecote.widen_progress, dovecote.begin_progress, dovecote.open_progress,
              dovecote.unprocessed, dovecote.move_marks, dovecote.look_again, dovecote.absent, dovecote.unsettled_of,
              dovecote.events_in, dovecote.coarser, dovecote.wanted_since, dovecote.progress_key;
drop table dovecote.progress;
