-- Weeks: outbox, processed_events and published_batches have a partition for each, made ahead. What was dropped is
-- remembered.
--
-- What runs as the owner takes no lock for nothing, as it holds it until its caller's transaction ends, and no argument
-- without a bound. Weeks begin and end in UTC: in another zone seven days may be an hour more or less, and a time that
-- is made a text may be read as another one ('IST' is Israel's).

create function dovecote.week_suffix(monday timestamptz) returns text
language sql immutable parallel safe return to_char(monday at time zone 'UTC', 'IYYY"w"IW');

create function dovecote.week_monday(week text) returns timestamptz
language sql immutable parallel safe return to_date(week, 'IYYY"w"IW')::timestamp at time zone 'UTC';

create view dovecote.retention_lock as select 'held while weeks are kept in order' as purpose;

-- Made ahead -------------------------------------------------------------------------------------
-- There is no argument for the actor: the audit line has the login twice.

create function dovecote.make_partitions(weeks_ahead integer default 4) returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms' as $$
-- Make the partitions of last week, this week and `weeks_ahead` more; return how many weeks were new.
-- Last week too: an id may be a day older than the row.
-- Made as tables of their own and attached: CREATE ... PARTITION OF would wait for every open transaction that has written,
-- and all writers would wait for it.
declare
    made    integer := 0;
    mondays timestamptz[];
    monday  timestamptz;
    suffix  text;
    part    record;
begin
    if weeks_ahead is null or weeks_ahead not between 0 and 60 then
        raise exception 'partitions are made for 0 to 60 weeks ahead, not for %', coalesce(weeks_ahead::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    mondays := array(select w.monday from generate_series(-1, weeks_ahead) as n,
                         lateral (select date_trunc('week', now()) + make_interval(weeks => n) as monday) w
                     where to_regclass('dovecote.outbox_' || dovecote.week_suffix(w.monday)) is null order by 1);
    if mondays = '{}' then
        return 0;
    end if;
    begin
        -- Concurrent calls would collide on the names. Attaching takes the same lock; no other role may take it.
        lock table only dovecote.outbox in share update exclusive mode;
    exception when lock_not_available then
        raise warning 'no partitions are made: %', sqlerrm;
        return 0;
    end;
    foreach monday in array mondays loop
        suffix := dovecote.week_suffix(monday);
        continue when to_regclass('dovecote.outbox_' || suffix) is not null;
        begin
            for part in
                select parent, parent || '_' || suffix as name, lower, upper
                from (values ('outbox', dovecote.uuid_v7_lower_bound(monday)::text,
                                        dovecote.uuid_v7_lower_bound(monday + interval '7 days')::text),
                             ('processed_events', dovecote.uuid_v7_lower_bound(monday)::text,
                                                  dovecote.uuid_v7_lower_bound(monday + interval '7 days')::text),
                             ('published_batches', monday::text, (monday + interval '7 days')::text))
                     as wanted (parent, lower, upper)
            loop
                execute format('create table dovecote.%I (like dovecote.%I including defaults including constraints)',
                               part.name, part.parent);
                execute format('alter table dovecote.%I attach partition dovecote.%I for values from (%L) to (%L)',
                               part.parent, part.name, part.lower, part.upper);
            end loop;
            made := made + 1;
        exception
            -- The default partition has rows of that week already, or a long transaction reads the table.
            when check_violation or lock_not_available then
                raise warning 'the partitions of week % are not made: %', suffix, sqlerrm;
        end;
    end loop;
    return made;
end $$;

create function dovecote.ensure_partitions(weeks_ahead integer default 4) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- Make the partitions of last week, this week and `weeks_ahead` more; return how many weeks were new.
declare
    made constant integer := dovecote.make_partitions(weeks_ahead);
begin
    if made > 0 then
        perform dovecote.write_audit_line(session_user, 'partitions.made', null, made,
                                          jsonb_build_object('weeks_ahead', weeks_ahead));
    end if;
    return made;
end $$;

select dovecote.make_partitions();

-- What was dropped ------------------------------------------------------------------------------

create table dovecote.dropped_partitions (
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
    actor            text        not null,
    dropped_at       timestamptz not null default clock_timestamp(),
    constraint dropped_partitions_pkey primary key (id),
    constraint dropped_partitions_archive_has_a_checksum check ((archive is null) = (checksum is null))
);

comment on table dovecote.dropped_partitions is 'Weeks that are gone: what was in them, where their archive is, who dropped them.';
comment on column dovecote.dropped_partitions.checksum is 'SHA-256 of the archive''s manifest.json, in hex.';

create index dropped_partitions_ids_idx on dovecote.dropped_partitions (lower_id);

-- A row of a dropped week finds no partition and comes to the default one. Nobody else pays for these triggers.

create function dovecote.refuse_dropped_partition() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
begin
    if exists (select from dovecote.dropped_partitions w where new.id >= w.lower_id and new.id < w.upper_id) then
        raise exception 'the outbox refuses the event: id % is of %, a week that was dropped; make the id when the event is written',
                        new.id, dovecote.uuid_v7_time(new.id)
            using errcode = 'check_violation', schema = 'dovecote', table = 'outbox';
    end if;
    return new;
end $$;

create trigger refuse_dropped_partition before insert on dovecote.outbox_default
    for each row execute function dovecote.refuse_dropped_partition();

create function dovecote.skip_dropped_partition() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- Every event of a dropped week was done. A copy of its message that turns up now is not new to anyone.
begin
    if exists (select from dovecote.dropped_partitions w where new.event_id >= w.lower_id and new.event_id < w.upper_id) then
        return null;
    end if;
    return new;
end $$;

create trigger skip_dropped_partition before insert on dovecote.processed_events_default
    for each row execute function dovecote.skip_dropped_partition();

-- Rows that came before their partition ---------------------------------------------------------

create function dovecote.partition_key(parent text) returns text
language sql immutable
return case parent when 'outbox' then 'id' when 'processed_events' then 'event_id'
                   when 'published_batches' then 'published_at' end;

create function dovecote.misplaced_weeks(parent text) returns setof timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
-- The Mondays of the weeks that the default partition holds rows of.
declare
    key    constant text := dovecote.partition_key(parent);
    found  timestamptz;
    bound  text := '-infinity';
    time_of constant text := case key when 'published_at' then key else format('dovecote.uuid_v7_time(%I)', key) end;
begin
    if key <> 'published_at' then
        bound := '00000000-0000-0000-0000-000000000000';
    end if;
    loop
        execute format('select %s from dovecote.%I where %I >= %L order by %I limit 1',
                       time_of, parent || '_default', key, bound, key) into found;
        exit when found is null;
        found := date_trunc('week', found at time zone 'UTC') at time zone 'UTC';
        return next found;
        bound := case key when 'published_at' then (found + interval '7 days')::text
                          else dovecote.uuid_v7_lower_bound(found + interval '7 days')::text end;
    end loop;
end $$;

create function dovecote.make_staging_table(parent text, monday timestamptz) returns text
language plpgsql set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
-- A table like the week's partition to be, with its indexes and a constraint that spares attaching it a scan.
declare
    staging constant text := format('%s_%s_staging', parent, dovecote.week_suffix(monday));
    key   constant text := dovecote.partition_key(parent);
    lower text := monday::text;
    upper text := (monday + interval '7 days')::text;
begin
    if to_regclass('dovecote.' || staging) is null then
        if key <> 'published_at' then
            lower := dovecote.uuid_v7_lower_bound(monday)::text;
            upper := dovecote.uuid_v7_lower_bound(monday + interval '7 days')::text;
        end if;
        execute format('create table dovecote.%I (like dovecote.%I including defaults including constraints including indexes)', staging, parent);
        execute format('alter table dovecote.%I add constraint of_its_week check (%I is not null and %I >= %L and %I < %L)',
                       staging, key, key, lower, key, upper);
    end if;
    return staging;
end $$;

create function dovecote.copy_misplaced_rows(most integer default 10000) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms' as $$
-- Copy up to `most` rows of the default partitions to the partition their week is to have; return how many, 0 when
-- all are copied. Readers go on seeing the rows where they are.
declare
    part   record;
    monday timestamptz;
    staging  text;
    copied bigint;
begin
    if most is null or most not between 1 and 100000 then
        raise exception '1 to 100000 rows are copied at a time, not %', coalesce(most::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    if not dovecote.try_lock('retention_lock') then
        raise exception 'another run of dovecote maintain is in progress' using errcode = 'lock_not_available';
    end if;
    for part in select * from (values ('outbox', 'id'), ('processed_events', 'event_id')) as parents (name, key) loop
        for monday in select dovecote.misplaced_weeks(part.name) loop
            staging := dovecote.make_staging_table(part.name, monday);
            execute format(
                'insert into dovecote.%1$I
                 select d.* from dovecote.%2$I d
                 where d.%3$I < %4$L and d.%3$I >= %5$L
                   and d.%3$I > coalesce((select a.%3$I from dovecote.%1$I a order by a.%3$I desc limit 1), %5$L)
                 order by d.%3$I limit %6$s',
                staging, part.name || '_default', part.key,
                dovecote.uuid_v7_lower_bound(monday + interval '7 days'), dovecote.uuid_v7_lower_bound(monday), most);
            get diagnostics copied = row_count;
            if copied > 0 then
                return copied;
            end if;
        end loop;
    end loop;
    return 0;
end $$;

create function dovecote.move_misplaced_rows() returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '100ms' as $$
-- Make the copies the partitions of their weeks, and empty the default ones, at once; return how many rows that
-- were. What came since the copies were made is copied now, while writers wait.
declare
    parents constant text[] := array['outbox', 'processed_events', 'published_batches'];
    same    constant text[] := array['a.id = d.id', 'a.event_id = d.event_id and a.handler_name = d.handler_name',
                                     'a.published_at = d.published_at and a.positions = d.positions'];
    mondays timestamptz[];
    monday  timestamptz;
    staging   text;
    suffix  text;
    lower   text;
    upper   text;
    rows_there  bigint;
    copied  bigint;
    part    bigint;
    moved   bigint := 0;
begin
    if not dovecote.try_lock('retention_lock') then
        raise exception 'another run of dovecote maintain is in progress' using errcode = 'lock_not_available';
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

    mondays := array(select distinct w from unnest(parents) p, dovecote.misplaced_weeks(p) w order by w);
    for i in 1 .. 3 loop
        execute format('select count(*) from dovecote.%I', parents[i] || '_default') into rows_there;
        copied := 0;
        foreach monday in array mondays loop
            suffix := dovecote.week_suffix(monday);
            continue when to_regclass(format('dovecote.%I', parents[i] || '_' || suffix)) is not null;
            lower := monday::text;
            upper := (monday + interval '7 days')::text;
            if parents[i] <> 'published_batches' then
                lower := dovecote.uuid_v7_lower_bound(monday)::text;
                upper := dovecote.uuid_v7_lower_bound(monday + interval '7 days')::text;
                -- A dropped week stays without a partition: its absence is what keeps late copies out.
                continue when exists (select from dovecote.dropped_partitions w where w.lower_id = lower::uuid);
            end if;
            staging := dovecote.make_staging_table(parents[i], monday);
            if parents[i] = 'processed_events' then  -- a replay may have signed it since
                execute format('delete from dovecote.%I a using dovecote.%I d where %s and a.replay_id is distinct from d.replay_id',
                               staging, parents[i] || '_default', same[i]);
            end if;
            execute format(
                'insert into dovecote.%1$I select d.* from dovecote.%2$I d
                 where d.%3$I >= %4$L and d.%3$I < %5$L and not exists (select from dovecote.%1$I a where %6$s)',
                staging, parents[i] || '_default', dovecote.partition_key(parents[i]), lower, upper, same[i]);
            execute format('select count(*) from dovecote.%I', staging) into part;
            copied := copied + part;
        end loop;
        if copied <> rows_there then
            raise exception '%: % rows copied of %', parents[i] || '_default', copied, rows_there using errcode = 'data_exception';
        end if;
        execute format('truncate dovecote.%I', parents[i] || '_default');
        foreach monday in array mondays loop
            suffix := dovecote.week_suffix(monday);
            staging := format('%s_%s_staging', parents[i], suffix);
            continue when to_regclass('dovecote.' || staging) is null;
            lower := monday::text;
            upper := (monday + interval '7 days')::text;
            if parents[i] <> 'published_batches' then
                lower := dovecote.uuid_v7_lower_bound(monday)::text;
                upper := dovecote.uuid_v7_lower_bound(monday + interval '7 days')::text;
            end if;
            execute format('alter table dovecote.%I rename to %I', staging, parents[i] || '_' || suffix);
            execute format('alter table dovecote.%I attach partition dovecote.%I for values from (%L) to (%L)',
                           parents[i], parents[i] || '_' || suffix, lower, upper);
            execute format('alter table dovecote.%I drop constraint of_its_week', parents[i] || '_' || suffix);
        end loop;
        moved := moved + copied;
    end loop;
    return moved;
end $$;

create function dovecote.place_misplaced_rows() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- Move what lies in the default partitions into the partitions of its weeks; return how many rows that were.
declare
    moved constant bigint := dovecote.move_misplaced_rows();
begin
    if moved > 0 then
        perform dovecote.write_audit_line(session_user, 'partitions.filled', null, moved, '{}');
    end if;
    return moved;
end $$;

-- Rights ---------------------------------------------------------------------------------------

grant select on dovecote.dropped_partitions to dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.week_suffix, dovecote.week_monday
    to dovecote_writer, dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.ensure_partitions, dovecote.copy_misplaced_rows, dovecote.place_misplaced_rows
    to dovecote_worker, dovecote_operator;
