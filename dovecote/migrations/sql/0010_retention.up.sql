-- Old weeks are dropped whole, once nothing needs them any more.

-- What prevents that a week is dropped ----------------------------------------------------------

-- At or below a handler's low-water mark nothing is unprocessed, and of no unknown version.
create function dovecote.partition_blockers(lower_id uuid, upper_id uuid)
returns table (handler_name text, blocker text, events bigint, example uuid)
language sql stable set search_path = pg_catalog, pg_temp as $$
    -- Everything for which events of these ids may still be needed. A replay is assumed to need all of them until
    -- its cursor is beyond them.
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
    wanted as (
        select s.*, coalesce(p.low_water_mark, 0) as low_water_mark
        from dovecote.subscriptions s left join dovecote.progress p on p.handler_name = s.handler_name
        -- Nothing of the week is above the low-water marks, most of the time: nothing is read then.
        where coalesce(p.low_water_mark, 0) < (select last.position from last)
    ),
    unprocessed as (
        select s.handler_name, 'unprocessed'::text, count(*), min(o.id::text)::uuid
        from dovecote.outbox o
        join wanted s on s.event_type = o.event_type and o.position > s.since_position
             and not s.published_above @> o.position and o.position > s.low_water_mark
        where o.id >= lower_id and o.id < upper_id and o.position > (select min(w.low_water_mark) from wanted w)
          and not exists (select from dovecote.processed_events p
                          where p.event_id = o.id and p.handler_name = s.handler_name
                            and p.event_id >= lower_id and p.event_id < upper_id)
          and not exists (select from dovecote.deliveries d
                          where d.event_id = o.id and d.handler_name = s.handler_name)
        group by s.handler_name
    ),
    -- A version without a subscription, of an event with one: newer code will subscribe to it.
    names as (
        select distinct on (1, 2) s.handler_name, dovecote.event_name(s.event_type) as name, s.since_position,
               s.published_above, s.low_water_mark
        from wanted s order by 1, 2, 3, s.event_type
    ),
    unknown as (
        select f.handler_name, 'unknown version'::text, count(*), min(o.id::text)::uuid
        from dovecote.outbox o
        join names f on f.name = dovecote.event_name(o.event_type) and o.position > f.since_position
             and not f.published_above @> o.position and o.position > f.low_water_mark
        where o.id >= lower_id and o.id < upper_id and o.position > (select min(w.low_water_mark) from wanted w)
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

comment on function dovecote.partition_blockers is 'Why a range of ids cannot be dropped yet, by handler; no row when it can.';

-- Dropping a week -------------------------------------------------------------------------------

create function dovecote.lock_partition(week text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '5s' as $$
-- Nothing is added to the week until this transaction ends; everybody may read it. Nobody writes there any more
-- but a consumer with an old message. Writers of open transactions are waited for.
begin
    if week is null or week !~ '^[0-9]{4}w[0-9]{2}$' or to_regclass('dovecote.outbox_' || week) is null then
        raise exception 'there is no partition for week %', coalesce(left(week, 20), 'null')
            using errcode = 'undefined_table';
    end if;
    -- An id may be a day off, and a transaction that began then may be open still.
    if dovecote.week_monday(week) + interval '8 days' > now() then
        raise exception 'week % is too young to be dropped', week using errcode = 'object_not_in_prerequisite_state';
    end if;
    if not dovecote.try_lock('retention_lock') then
        raise exception 'another run of dovecote maintain is in progress'
            using errcode = 'lock_not_available';
    end if;
    execute format('lock table dovecote.%I, dovecote.%I in share mode', 'outbox_' || week, 'processed_events_' || week);
end $$;

create function dovecote.idle_batches(week text, lower_id uuid, upper_id uuid) returns setof text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
-- The partitions of published_batches, up to this week's, whose every position is of this week or dropped before.
declare
    part   record;
    low    bigint;
    high   bigint;
    in_use boolean;
begin
    for part in
        select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent = 'dovecote.published_batches'::regclass
          and c.relname ~ '^published_batches_[0-9]{4}w[0-9]{2}$'
          and c.relname <= 'published_batches_' || week
        order by c.relname
    loop
        execute format('select min(lower(positions)), max(upper(positions)) - 1 from dovecote.%I', part.relname) into low, high;
        continue when high > (select checkpoint from dovecote.relay_state);
        execute format(
            'select exists (select from dovecote.outbox o
                            where o.position between %L and %L and (o.id < %L or o.id >= %L)
                              and exists (select from dovecote.%I b where b.positions @> o.position))',
            low, high, lower_id, upper_id, part.relname) into in_use;
        if not in_use then
            return next part.relname;
        end if;
    end loop;
end $$;

create function dovecote.drop_partition(
    week               text,
    actor         text,
    archive            text   default null,
    checksum           text   default null,
    archived_events    bigint default null,
    archived_processed bigint default null
) returns dovecote.dropped_partitions
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '100ms' as $$
-- The only way a week goes: outbox, processed_events and what belongs to no other week of published_batches, at
-- once, with a line in dropped_partitions and one in audit_log. Refuses what is still needed, to every caller.
--
-- The long queries run while only the week itself is locked. The parents, where all writers insert, are locked with a
-- lock_timeout of a tenth of a second, again and again: DETACH CONCURRENTLY is impossible beside a default partition.
declare
    monday    timestamptz;
    lower_id  uuid;
    upper_id  uuid;
    in_the_way text;
    batches   text[];
    gone      dovecote.dropped_partitions;
begin
    -- Nobody here can open the archive. What is written down for ever is at least a path, and of the right number of rows.
    if actor is null or length(actor) not between 1 and 200 or actor ~ '[[:cntrl:]]' then
        raise exception 'who drops a week is a name of 1 to 200 characters without control characters'
            using errcode = 'invalid_parameter_value';
    elsif archive is not null and (length(archive) not between 1 and 1000 or archive ~ '[[:cntrl:]]') then
        raise exception 'an archive''s path has 1 to 1000 characters and no control characters'
            using errcode = 'invalid_parameter_value';
    elsif (archive is null) <> (checksum is null) or checksum !~ '^[0-9a-f]{64}$' then
        raise exception 'an archive comes with the SHA-256 of its manifest, 64 hex digits'
            using errcode = 'invalid_parameter_value';
    elsif archive is not null and (archived_events is null or archived_processed is null) then
        raise exception 'an archive comes with the numbers of its rows' using errcode = 'invalid_parameter_value';
    end if;
    perform dovecote.lock_partition(week);
    monday := dovecote.week_monday(week);
    lower_id := dovecote.uuid_v7_lower_bound(monday);
    upper_id := dovecote.uuid_v7_lower_bound(monday + interval '7 days');
    select string_agg(format('%s %s%s', o.events, o.blocker, ' for ' || o.handler_name), ', ') into in_the_way
    from dovecote.partition_blockers(lower_id, upper_id) o;
    if in_the_way is not null then
        raise exception 'week % is still needed: %', week, in_the_way using errcode = 'object_in_use';
    end if;

    gone.id := dovecote.uuid_v7();
    gone.week := week;
    gone.lower_id := lower_id;
    gone.upper_id := upper_id;
    gone.archive := archive;
    gone.checksum := checksum;
    gone.actor := actor;
    gone.dropped_at := clock_timestamp();
    select count(*), min(o.position), max(o.position), min(o.created_at), max(o.created_at)
        into gone.events, gone.first_position, gone.last_position, gone.first_created_at, gone.last_created_at
    from dovecote.outbox o where o.id >= lower_id and o.id < upper_id;
    select count(*) into gone.processed
    from dovecote.processed_events p where p.event_id >= lower_id and p.event_id < upper_id;
    if archived_events <> gone.events or archived_processed <> gone.processed then
        raise exception 'the archive of week % is not what is in it: % and % rows instead of % and %', week,
                        archived_events, archived_processed, gone.events, gone.processed
            using errcode = 'data_exception';
    end if;
    batches := array(select dovecote.idle_batches(week, lower_id, upper_id));

    for attempt in 1 .. 40 loop
        begin
            lock table only dovecote.outbox, only dovecote.processed_events, only dovecote.published_batches
                in access exclusive mode;
            lock table dovecote.deliveries, dovecote.replays in share row exclusive mode;
            exit;
        exception when lock_not_available then
            if attempt = 40 then
                raise exception 'week % is not dropped: others hold the tables, see pg_locks and pg_stat_activity', week
                    using errcode = 'lock_not_available',
                          hint = 'A long transaction reads or writes the outbox; try again when it has ended.';
            end if;
            perform pg_sleep(0.05 + random() * 0.2);
        end;
    end loop;

    -- What may have come since the long questions were asked.
    if exists (select from dovecote.deliveries d
               where d.event_id >= lower_id and d.event_id < upper_id and d.state <> 'discarded')
       or exists (select from dovecote.replays r
                  where r.state in ('pending', 'running', 'paused') and r.cursor_position < gone.last_position) then
        raise exception 'week % is needed again: something of it failed, or is replayed', week using errcode = 'object_in_use';
    end if;
    delete from dovecote.deliveries d where d.event_id >= lower_id and d.event_id < upper_id;
    execute format('drop table dovecote.%I, dovecote.%I', 'outbox_' || week, 'processed_events_' || week);
    for i in 1 .. coalesce(array_length(batches, 1), 0) loop
        execute format('drop table dovecote.%I', batches[i]);
    end loop;
    insert into dovecote.dropped_partitions values (gone.*);
    insert into dovecote.audit_log (actor, action, details) values (actor, 'partition.dropped', to_jsonb(gone));
    return gone;
end $$;

-- Rights ---------------------------------------------------------------------------------------

grant execute on function dovecote.partition_blockers to dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.lock_partition, dovecote.drop_partition to dovecote_worker, dovecote_operator;
