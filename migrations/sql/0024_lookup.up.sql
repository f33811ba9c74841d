-- Is an event in the outbox? Consumers ask for messages of another run of Postgres (dovecote/store/lookup.py).

create function dovecote.outbox_run() returns text
language sql stable parallel safe
begin atomic
    -- The file, which names the database: a dump may be restored on the server it was taken from. This is asked with
    -- each bundle: what dovecote.server_run() says besides would cost more than all else that is asked then.
    select pg_catalog.concat_ws(' ', dovecote.server_started(),
                                pg_catalog.pg_relation_filepath('dovecote.relay_state'::regclass));
end;

comment on function dovecote.outbox_run is
    'In which run of Postgres, and since which restore, the outbox is read: what was seen committed in this one is there.';

create function dovecote.not_in_outbox(event_ids uuid[], positions bigint[], event_types text[]) returns setof uuid
-- Volatile: its statement takes its snapshot after its locks. A row that dovecote.place_strays moves would be seen in
-- neither place by a snapshot from before.
language plpgsql volatile
-- Mostly all of them are there.
rows 1
-- One plan, made once: Postgres would go on making a new one for each call, over all weeks. In that one plan the range of
-- ids leaves out the weeks that hold none of them, and the id of each event all weeks but its own.
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
as $$
-- Return the ids of those events that are not there with this id, position and type.
declare
    low constant uuid := (select id from pg_catalog.unnest(event_ids) as event (id) order by id limit 1);
    high constant uuid := (select id from pg_catalog.unnest(event_ids) as event (id) order by id desc limit 1);
begin
    return query
        select event.id
        from unnest(event_ids, positions, event_types) as event (id, "position", type)
        -- A subquery for each event: a join might read whole weeks.
        where (select o."position" = event."position" and o.event_type = event.type
               from dovecote.outbox o
               where o.id = event.id and o.id between low and high) is not true;
end $$;

comment on function dovecote.not_in_outbox is
    'Which of these events are not in the outbox with this id, position and type: Postgres has forgotten them, or never '
    'knew them.';

grant execute on function dovecote.outbox_run, dovecote.not_in_outbox to dovecote_worker, dovecote_operator;
