-- Deliveries that nobody can send: of handlers that no route has, and of events that are gone. And a retry that is sent
-- once more because nothing was heard of it goes in the message it went in before.

alter table dovecote.deliveries add column first_leased_at timestamptz;

comment on column dovecote.deliveries.first_leased_at is
    'When this attempt was leased first. What was leased together then is one message, however often it is sent.';

-- Those of one handler by themselves: others have any number of rows, due or not, and are not looked at.
create index deliveries_due_of_handler_idx on dovecote.deliveries (handler_name, next_attempt_at, position)
    where state = 'retrying';

-- In place of due_deliveries, which the code before this revision calls.
create function dovecote.due_retries(
    handlers text[], bundle_sizes integer[], max_events integer, max_bytes bigint, max_bundle_bytes bigint
) returns setof dovecote.deliveries
language plpgsql volatile
rows 10
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Return, locked, the retries of these handlers whose time has come, each released one followed by those that wait
-- behind it, as many as make a bundle: `bundle_sizes`, 1 for a handler that keeps no order. The handlers take turns,
-- so that none waits for another's many. The first is returned whatever its size.
declare
    wanted    record;
    due       dovecote.deliveries;
    follower  dovecote.deliveries;
    followers refcursor;
    size      bigint;
    room      bigint := max_bytes;       -- bytes left for all
    left_over integer := max_events;     -- events left for all
    of_bundle bigint;                    -- bytes left for this bundle
    behind    integer;                   -- events left for this bundle
begin
    for wanted in
        select oldest.* from unnest(handlers, bundle_sizes) as route (handler, bundle_size)
        cross join lateral (
            select d.handler_name, d.event_id, route.bundle_size,
                   pg_catalog.row_number() over (order by d.next_attempt_at, d.position) as turn
            from dovecote.deliveries d
            where d.handler_name = route.handler and d.state = 'retrying' and d.next_attempt_at <= pg_catalog.now()
            order by d.next_attempt_at, d.position limit max_events) as oldest
        where route.handler not in (select p.handler_name from dovecote.paused_handlers p)
        order by oldest.turn limit max_events
    loop
        exit when left_over = 0;
        select d.* into due from dovecote.deliveries d
        where d.handler_name = wanted.handler_name and d.event_id = wanted.event_id
          and d.state = 'retrying' and d.next_attempt_at <= pg_catalog.now()
        for update skip locked;
        continue when not found;
        size := coalesce(dovecote.message_bytes(due.event_id), 0);
        exit when size > room and left_over < max_events;
        room := room - size;
        left_over := left_over - 1;
        return next due;
        -- Failed before, or sent before: it goes as it is. What waits behind one that failed goes on waiting for it.
        continue when due.attempts > 0 or due.error is not null or due.leased_until is not null;
        behind := least(wanted.bundle_size - 1, left_over);
        continue when behind < 1;
        of_bundle := least(max_bundle_bytes - size, room);
        if due.replay_id is null then
            open followers for
                select d.* from dovecote.deliveries d
                where d.handler_name = due.handler_name and d.state = 'waiting' and d.replay_id is null
                  and d.aggregate_type = due.aggregate_type and d.aggregate_id = due.aggregate_id
                  and d.position > due.position
                order by d.position limit behind for update of d skip locked;
        else
            open followers for
                select d.* from dovecote.deliveries d
                where d.handler_name = due.handler_name and d.state = 'waiting' and d.replay_id = due.replay_id
                  and d.aggregate_type = due.aggregate_type and d.aggregate_id = due.aggregate_id
                  and d.position > due.position
                order by d.position limit behind for update of d skip locked;
        end if;
        loop
            fetch followers into follower;
            exit when not found;
            size := coalesce(dovecote.message_bytes(follower.event_id), 0);
            exit when size > of_bundle;
            of_bundle := of_bundle - size;
            room := room - size;
            left_over := left_over - 1;
            return next follower;
        end loop;
        close followers;
    end loop;
end $$;

grant execute on function dovecote.due_retries to dovecote_worker, dovecote_operator;
