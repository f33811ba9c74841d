-- Handlers that keep the order of each aggregate: what blocks an event, what is released when it is done, what is sent
-- again.
--
-- A blocked aggregate is released one bundle at a time: the commit of a bundle releases the first event that waits
-- behind it, and the relay takes those behind that one along when it leases it. All at once would each be sent, found
-- to wait and requeued, again and again.

-- What blocks ----------------------------------------------------------------------------------

-- The one before is the last that was not discarded. Discarding an event that itself waits says nothing of what it
-- waited for: what comes after it must go on waiting for that. What the aggregate has at or below unblocked_up_to() is not
-- read.
create function dovecote.blocker(
    handler text, event_types text[], of_aggregate_type text, of_aggregate_id text, before_position bigint
) returns uuid
language sql stable set search_path = pg_catalog, pg_temp as $$
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
          and o.position > (select dovecote.unblocked_up_to(handler))
          and (s.published_above is null or not s.published_above @> o.position)
          and not exists (select from dovecote.deliveries d
                          where d.event_id = o.id and d.handler_name = handler and d.state = 'discarded')
        order by o.position desc limit 1
    ) before
    where not exists (select from dovecote.processed_events p
                      where p.event_id = before.id and p.handler_name = handler)
$$;

-- What dovecote.blocker() says, for many events in one plan that is made once. These tables are empty most of the time,
-- and a plan from then must do when they are full: all is switched off but the indexes that have the order asked for.
-- An event with a free way is not returned.
create function dovecote.blockers(
    handler text, event_types text[], event_ids uuid[], aggregate_types text[], aggregate_ids text[], positions bigint[]
) returns table (event_id uuid, blocker uuid)
language sql stable
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_bitmapscan = off
set enable_seqscan = off set enable_sort = off as $$
    select event.id, before.id
    from unnest(event_ids, aggregate_types, aggregate_ids, positions) as event (id, aggregate_type, aggregate_id, position)
    cross join lateral (
        select o.id
        from dovecote.outbox o
        left join dovecote.subscriptions s on s.handler_name = handler and s.event_type = o.event_type
        where o.aggregate_type = event.aggregate_type and o.aggregate_id = event.aggregate_id
          and o.position < event.position and o.event_type = any(event_types)
          and o.position > coalesce(s.since_position, 0)
          and o.position > (select dovecote.unblocked_up_to(handler))
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

-- Releasing ------------------------------------------------------------------------------------

-- The transaction that parks an event and the one that commits its predecessor meet here, or neither would see the other.
create function dovecote.release_key(handler text) returns bigint
language sql immutable parallel safe return (17607::bigint << 48) | (hashtext(handler)::bigint & 4294967295);

create function dovecote.share_release_lock(handler text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Share the lock that is taken exclusively to park events of the handler. Wait for a second at most, and not for a stranger:
-- what is not released now, the relay does within a second or two.
declare
    give_up_at timestamptz := clock_timestamp() + interval '1 second';
begin
    while not pg_try_advisory_xact_lock_shared(dovecote.release_key(handler)) loop
        if clock_timestamp() > give_up_at
           or exists (select from dovecote.look_at_advisory_locks() l where l.kind = 17607) then
            return false;
        end if;
        perform pg_sleep(0.005);
    end loop;
    return true;
end $$;

-- Rarely called: planned for what there is.
create function dovecote.release(handler text, event_types text[], event_ids uuid[]) returns bigint
language sql volatile
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan set enable_bitmapscan = off
set enable_seqscan = off set enable_sort = off as $$
    -- Let those of the waiting events go on that nothing blocks any more; return how many. One that is
    -- locked is left to the holder of the lock.
    with blocked as materialized (
        select b.event_id
        from (select pg_catalog.array_agg(d.event_id) as ids, pg_catalog.array_agg(d.aggregate_type) as types,
                     pg_catalog.array_agg(d.aggregate_id) as aggregates, pg_catalog.array_agg(d.position) as positions
              from dovecote.deliveries d
              where d.handler_name = handler and d.event_id = any(event_ids) and d.state = 'waiting') as waiting
        cross join lateral dovecote.blockers(handler, event_types, ids, types, aggregates, positions) as b
    ), free as (
        select d.event_id from dovecote.deliveries d
        where d.handler_name = handler and d.event_id = any(event_ids) and d.state = 'waiting'
          and case when d.replay_id is null
              then d.event_id not in (select b.event_id from blocked b)
              else not exists (select from dovecote.deliveries before
                               where before.replay_id = d.replay_id and before.handler_name = d.handler_name
                                 and before.aggregate_type = d.aggregate_type and before.aggregate_id = d.aggregate_id
                                 and before.position < d.position and before.state <> 'discarded') end
        for update skip locked
    ), released as (
        update dovecote.deliveries d
        set state = 'retrying', next_attempt_at = pg_catalog.clock_timestamp(), leased_until = null,
            updated_at = pg_catalog.clock_timestamp()
        from free where d.handler_name = handler and d.event_id = free.event_id
        returning 1
    )
    select pg_catalog.count(*) from released
$$;

-- One plan will do, as for the blockers.
create function dovecote.release_next(
    handler text, event_types text[], aggregate_types text[], aggregate_ids text[], positions bigint[], replay uuid
) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_bitmapscan = off
set enable_seqscan = off set enable_sort = off as $$
-- Release the first event that waits in each aggregate above the position that is done; return how many. The last
-- statement of a transaction: what is parked meanwhile is examined again once it has committed.
declare
    firsts uuid[];
begin
    perform dovecote.share_release_lock(handler);
    -- Above the position, or under a held snapshot all that has left the index since would be walked over.
    if replay is null then
        select pg_catalog.array_agg(first.event_id) into firsts
        from unnest(aggregate_types, aggregate_ids, positions) as done (type, id, position)
        cross join lateral (
            select d.event_id from dovecote.deliveries d
            where d.handler_name = handler and d.state = 'waiting' and d.replay_id is null
              and d.aggregate_type = done.type and d.aggregate_id = done.id and d.position > done.position
            order by d.position limit 1) as first;
    else
        select pg_catalog.array_agg(first.event_id) into firsts
        from unnest(aggregate_types, aggregate_ids, positions) as done (type, id, position)
        cross join lateral (
            select d.event_id from dovecote.deliveries d
            where d.handler_name = handler and d.state = 'waiting' and d.replay_id = replay
              and d.aggregate_type = done.type and d.aggregate_id = done.id and d.position > done.position
            order by d.position limit 1) as first;
    end if;
    return case when firsts is null then 0 else dovecote.release(handler, event_types, firsts) end;
end $$;

create function dovecote.release_parked(handler text, event_types text[], event_ids uuid[]) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Release those of the events that were parked while their predecessor was committing; return how many. Run it in a
-- transaction of its own, after the one that parked them: a session that takes the lock later sees them, one that took
-- it earlier has committed. It only tries the lock: otherwise a frozen worker that holds it would stop all others.
declare
    give_up_at timestamptz := pg_catalog.clock_timestamp() + interval '1 second';
begin
    while not pg_catalog.pg_try_advisory_xact_lock(dovecote.release_key(handler))
          and pg_catalog.clock_timestamp() < give_up_at loop
        perform pg_catalog.pg_sleep(0.005);
    end loop;
    return dovecote.release(handler, event_types, event_ids);
end $$;

-- What is sent again ---------------------------------------------------------------------------

create function dovecote.due_retries(
    handlers text[], bundle_sizes integer[], max_events integer, max_bytes bigint, max_bundle_bytes bigint
) returns setof dovecote.deliveries
language plpgsql volatile
rows 10
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_bitmapscan = off
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_sort = off as $$
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
        -- Failed before, or sent before: it is sent alone. What waits behind one that failed keeps waiting.
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

-- Rights ---------------------------------------------------------------------------------------

grant execute on function dovecote.blocker, dovecote.blockers to dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.release_key
    to dovecote_writer, dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function
    dovecote.share_release_lock, dovecote.release, dovecote.release_next, dovecote.release_parked,
    dovecote.due_retries
    to dovecote_worker, dovecote_operator;
