-- Old weeks are dropped whole, once nothing of them is owed any more; what was dropped is remembered here.
-- Expand only: code from before this migration goes on working (docs/adr: rolling deploys).

-- What was dropped ------------------------------------------------------------------------------

create table dovecote.dropped_weeks (
    id               uuid        not null default dovecote.uuid_v7(),
    week             text        not null,
    lower_id         uuid        not null,
    upper_id         uuid        not null,
    events           bigint      not null,
    processed        bigint      not null,
    first_position   bigint,
    last_position    bigint,
    first_created_at timestamptz,
    last_created_at  timestamptz,
    archive          text,
    checksum         text,
    dropped_by       text        not null,
    dropped_at       timestamptz not null default clock_timestamp(),
    constraint dropped_weeks_pkey primary key (id),
    constraint dropped_weeks_archive_has_a_checksum check ((archive is null) = (checksum is null))
);

comment on table dovecote.dropped_weeks is 'Weeks that are gone: what was in them, where their archive is, who dropped them.';
comment on column dovecote.dropped_weeks.checksum is 'SHA-256 of the archive''s manifest.json, in hex.';

create index dropped_weeks_ids_idx on dovecote.dropped_weeks (lower_id);

-- A row of a dropped week finds no partition and comes to the default one. Nobody else pays for these triggers.

create function dovecote.refuse_dropped_week() returns trigger
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp as $$
begin
    if exists (select from dovecote.dropped_weeks w where new.id >= w.lower_id and new.id < w.upper_id) then
        raise exception 'the outbox refuses the event: id % is of %, a week that was dropped; make the id when the event is written',
                        new.id, dovecote.uuid_v7_time(new.id)
            using errcode = 'check_violation', schema = 'dovecote', table = 'outbox';
    end if;
    return new;
end $$;

create trigger refuse_dropped_week before insert on dovecote.outbox_default
    for each row execute function dovecote.refuse_dropped_week();

create function dovecote.skip_dropped_week() returns trigger
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp as $$
-- Every event of a dropped week was done. A copy of its message that turns up now is not new to anyone.
begin
    if exists (select from dovecote.dropped_weeks w where new.event_id >= w.lower_id and new.event_id < w.upper_id) then
        return null;
    end if;
    return new;
end $$;

create trigger skip_dropped_week before insert on dovecote.processed_events_default
    for each row execute function dovecote.skip_dropped_week();

-- What holds a week back ------------------------------------------------------------------------

create function dovecote.week_suffix(monday timestamptz) returns text
language sql immutable parallel safe as $$
    select to_char(monday at time zone 'UTC', 'IYYY"w"IW')
$$;

create function dovecote.week_monday(week text) returns timestamptz
language sql immutable parallel safe as $$
    select to_date(week, 'IYYY"w"IW')::timestamp at time zone 'UTC'
$$;

create function dovecote.fact_of(event_type text) returns text
language sql immutable parallel safe as $$
    -- 'billing.payment_recorded' of 'billing.payment_recorded.v2'
    select substring(event_type from '^(.*)[.]v[0-9]+$')
$$;

create function dovecote.week_obstacles(lower_id uuid, upper_id uuid)
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
        select s.handler_name, dovecote.fact_of(s.event_type) as fact, min(s.since_position) as since_position
        from dovecote.subscriptions s group by 1, 2
    ),
    unknown as (
        select f.handler_name, 'unknown version'::text, count(*), min(o.id::text)::uuid
        from dovecote.outbox o
        join facts f on f.fact = dovecote.fact_of(o.event_type) and o.position > f.since_position
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

comment on function dovecote.week_obstacles is 'Why a range of ids cannot be dropped yet, by handler; no row when it can.';

-- Dropping a week -------------------------------------------------------------------------------

create function dovecote.hold_week(week text) returns void
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp set lock_timeout = '5s' as $$
-- Nothing is added to the week until this transaction ends; everybody may read it. Nobody writes there any more
-- but a consumer with an old message. Writers of open transactions are waited for.
begin
    if not pg_try_advisory_xact_lock(17606::bigint << 48) then
        raise exception 'another run of dovecote maintain is at work'
            using errcode = 'lock_not_available';
    end if;
    if week !~ '^[0-9]{4}w[0-9]{2}$' or to_regclass('dovecote.outbox_' || week) is null then
        raise exception 'there is no partition for week %', week using errcode = 'undefined_table';
    end if;
    execute format('lock table dovecote.%I, dovecote.%I in share mode', 'outbox_' || week, 'processed_events_' || week);
end $$;

create function dovecote.idle_batches(week text, lower_id uuid, upper_id uuid) returns setof text
language plpgsql stable as $$
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

create function dovecote.drop_week(
    week               text,
    dropped_by         text,
    archive            text   default null,
    checksum           text   default null,
    archived_events    bigint default null,
    archived_processed bigint default null
) returns dovecote.dropped_weeks
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp set lock_timeout = '100ms' as $$
-- The only way a week goes: outbox, processed_events and what belongs to no other week of published_batches, at
-- once, with a line in dropped_weeks and one in audit_log. Refuses what is still owed, whoever asks.
--
-- The long questions are asked while only the week itself is locked. The parents, where everybody writes, are asked
-- for with a tenth of a second's patience, again and again: DETACH CONCURRENTLY is not to be had beside a default
-- partition.
declare
    monday    constant timestamptz := dovecote.week_monday(week);
    lower_id  constant uuid := dovecote.uuid_v7_floor(monday);
    upper_id  constant uuid := dovecote.uuid_v7_floor(monday + interval '7 days');
    in_the_way text;
    batches   text[];
    gone      dovecote.dropped_weeks;
begin
    perform dovecote.hold_week(week);
    -- An id may be a day off, and a transaction that began then may be open still.
    if monday + interval '8 days' > now() then
        raise exception 'week % is too young to be dropped', week using errcode = 'object_not_in_prerequisite_state';
    end if;
    select string_agg(format('%s %s%s', o.events, o.obstacle, ' for ' || o.handler_name), ', ') into in_the_way
    from dovecote.week_obstacles(lower_id, upper_id) o;
    if in_the_way is not null then
        raise exception 'week % is still needed: %', week, in_the_way using errcode = 'object_in_use';
    end if;

    gone.id := dovecote.uuid_v7();
    gone.week := week;
    gone.lower_id := lower_id;
    gone.upper_id := upper_id;
    gone.archive := archive;
    gone.checksum := checksum;
    gone.dropped_by := dropped_by;
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
    insert into dovecote.dropped_weeks values (gone.*);
    insert into dovecote.audit_log (actor, action, details) values (dropped_by, 'week.dropped', to_jsonb(gone));
    return gone;
end $$;

-- Rows that came before their partition ---------------------------------------------------------

create function dovecote.stray_key(parent text) returns text
language sql immutable as $$
    select case parent when 'outbox' then 'id' when 'processed_events' then 'event_id' when 'published_batches' then 'published_at' end
$$;

create function dovecote.stray_weeks(parent text) returns setof timestamptz
language plpgsql stable as $$
-- The Mondays of the weeks that the default partition holds rows of.
declare
    key    constant text := dovecote.stray_key(parent);
    found  timestamptz;
    bound  text := '-infinity';
    moment constant text := case key when 'published_at' then key else format('dovecote.uuid_v7_time(%I)', key) end;
begin
    if key <> 'published_at' then
        bound := '00000000-0000-0000-0000-000000000000';
    end if;
    loop
        execute format('select %s from dovecote.%I where %I >= %L order by %I limit 1',
                       moment, parent || '_default', key, bound, key) into found;
        exit when found is null;
        found := date_trunc('week', found at time zone 'UTC') at time zone 'UTC';
        return next found;
        bound := case key when 'published_at' then (found + interval '7 days')::text
                          else dovecote.uuid_v7_floor(found + interval '7 days')::text end;
    end loop;
end $$;

create function dovecote.make_aside(parent text, monday timestamptz) returns text
language plpgsql as $$
-- A table like the week's partition to be, with its indexes and a constraint that spares attaching it a scan.
declare
    aside constant text := format('%s_%s_aside', parent, dovecote.week_suffix(monday));
    key   constant text := dovecote.stray_key(parent);
    lower text := monday::text;
    upper text := (monday + interval '7 days')::text;
begin
    if to_regclass('dovecote.' || aside) is null then
        if key <> 'published_at' then
            lower := dovecote.uuid_v7_floor(monday)::text;
            upper := dovecote.uuid_v7_floor(monday + interval '7 days')::text;
        end if;
        execute format('create table dovecote.%I (like dovecote.%I including defaults including constraints including indexes)', aside, parent);
        execute format('alter table dovecote.%I add constraint of_its_week check (%I is not null and %I >= %L and %I < %L)',
                       aside, key, key, lower, key, upper);
    end if;
    return aside;
end $$;

create function dovecote.copy_strays(most integer default 10000) returns bigint
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp set lock_timeout = '500ms' as $$
-- Copy up to `most` rows of the default partitions to the partition their week is to have; return how many, 0 when
-- all are copied. Readers go on seeing the rows where they are.
declare
    part   record;
    monday timestamptz;
    aside  text;
    copied bigint;
begin
    if not pg_try_advisory_xact_lock(17606::bigint << 48) then
        raise exception 'another run of dovecote maintain is at work' using errcode = 'lock_not_available';
    end if;
    for part in select * from (values ('outbox', 'id'), ('processed_events', 'event_id')) as parents (name, key) loop
        for monday in select dovecote.stray_weeks(part.name) loop
            aside := dovecote.make_aside(part.name, monday);
            execute format(
                'insert into dovecote.%1$I
                 select d.* from dovecote.%2$I d
                 where d.%3$I < %4$L and d.%3$I >= %5$L
                   and d.%3$I > coalesce((select a.%3$I from dovecote.%1$I a order by a.%3$I desc limit 1), %5$L)
                 order by d.%3$I limit %6$s',
                aside, part.name || '_default', part.key,
                dovecote.uuid_v7_floor(monday + interval '7 days'), dovecote.uuid_v7_floor(monday), most);
            get diagnostics copied = row_count;
            if copied > 0 then
                return copied;
            end if;
        end loop;
    end loop;
    return 0;
end $$;

create function dovecote.place_strays() returns bigint
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp set lock_timeout = '100ms' as $$
-- Make the copies the partitions of their weeks, and empty the default ones, at once; return how many rows that
-- were. What came since the copies were made is copied now, while writers wait.
declare
    parents constant text[] := array['outbox', 'processed_events', 'published_batches'];
    same    constant text[] := array['a.id = d.id', 'a.event_id = d.event_id and a.handler_name = d.handler_name',
                                     'a.published_at = d.published_at and a.positions = d.positions'];
    mondays timestamptz[];
    monday  timestamptz;
    aside   text;
    suffix  text;
    lower   text;
    upper   text;
    strays  bigint;
    copied  bigint;
    part    bigint;
    moved   bigint := 0;
begin
    if not pg_try_advisory_xact_lock(17606::bigint << 48) then
        raise exception 'another run of dovecote maintain is at work' using errcode = 'lock_not_available';
    end if;
    if not exists (select from dovecote.outbox_default) and not exists (select from dovecote.processed_events_default)
       and not exists (select from dovecote.published_batches_default) then
        return 0;
    end if;
    for attempt in 1 .. 40 loop
        begin
            lock table only dovecote.outbox, only dovecote.processed_events, only dovecote.published_batches,
                       dovecote.outbox_default, dovecote.processed_events_default, dovecote.published_batches_default
                in access exclusive mode;
            exit;
        exception when lock_not_available then
            if attempt = 40 then
                raise exception 'the default partitions are not emptied: others hold the tables, see pg_locks'
                    using errcode = 'lock_not_available';
            end if;
            perform pg_sleep(0.05 + random() * 0.2);
        end;
    end loop;

    mondays := array(select distinct w from unnest(parents) p, dovecote.stray_weeks(p) w order by w);
    for i in 1 .. 3 loop
        execute format('select count(*) from dovecote.%I', parents[i] || '_default') into strays;
        copied := 0;
        foreach monday in array mondays loop
            suffix := dovecote.week_suffix(monday);
            continue when to_regclass(format('dovecote.%I', parents[i] || '_' || suffix)) is not null;
            lower := monday::text;
            upper := (monday + interval '7 days')::text;
            if parents[i] <> 'published_batches' then
                lower := dovecote.uuid_v7_floor(monday)::text;
                upper := dovecote.uuid_v7_floor(monday + interval '7 days')::text;
                -- A dropped week stays without a partition: its absence is what keeps late copies out.
                continue when exists (select from dovecote.dropped_weeks w where w.lower_id = lower::uuid);
            end if;
            aside := dovecote.make_aside(parents[i], monday);
            if parents[i] = 'processed_events' then  -- a replay may have signed it since
                execute format('delete from dovecote.%I a using dovecote.%I d where %s and a.replay_id is distinct from d.replay_id',
                               aside, parents[i] || '_default', same[i]);
            end if;
            execute format(
                'insert into dovecote.%1$I select d.* from dovecote.%2$I d
                 where d.%3$I >= %4$L and d.%3$I < %5$L and not exists (select from dovecote.%1$I a where %6$s)',
                aside, parents[i] || '_default', dovecote.stray_key(parents[i]), lower, upper, same[i]);
            execute format('select count(*) from dovecote.%I', aside) into part;
            copied := copied + part;
        end loop;
        if copied <> strays then
            raise exception '%: % rows copied of %', parents[i] || '_default', copied, strays using errcode = 'data_exception';
        end if;
        execute format('truncate dovecote.%I', parents[i] || '_default');
        foreach monday in array mondays loop
            suffix := dovecote.week_suffix(monday);
            aside := format('%s_%s_aside', parents[i], suffix);
            continue when to_regclass('dovecote.' || aside) is null;
            lower := monday::text;
            upper := (monday + interval '7 days')::text;
            if parents[i] <> 'published_batches' then
                lower := dovecote.uuid_v7_floor(monday)::text;
                upper := dovecote.uuid_v7_floor(monday + interval '7 days')::text;
            end if;
            execute format('alter table dovecote.%I rename to %I', aside, parents[i] || '_' || suffix);
            execute format('alter table dovecote.%I attach partition dovecote.%I for values from (%L) to (%L)',
                           parents[i], parents[i] || '_' || suffix, lower, upper);
            execute format('alter table dovecote.%I drop constraint of_its_week', parents[i] || '_' || suffix);
        end loop;
        moved := moved + copied;
    end loop;
    return moved;
end $$;

-- A handler that is gone for good ---------------------------------------------------------------

create function dovecote.forget_handler(handler text, forgotten_by text) returns bigint
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

-- Rights ----------------------------------------------------------------------------------------

revoke all on function dovecote.hold_week, dovecote.drop_week, dovecote.copy_strays, dovecote.place_strays,
                       dovecote.make_aside, dovecote.idle_batches, dovecote.forget_handler from public;
grant execute on function dovecote.hold_week, dovecote.drop_week, dovecote.copy_strays, dovecote.place_strays
    to dovecote_worker, dovecote_operator;
grant execute on function dovecote.forget_handler to dovecote_operator;
grant select on dovecote.dropped_weeks to dovecote_worker, dovecote_operator;
