-- Functions mean the same whatever the caller's session says (docs/adr/0033).
--
-- A name without a schema is looked up in the caller's search_path when the statement runs: a temporary table, or a
-- function in a schema of the caller, then takes the place of Postgres's own. Two cures, and each function has one:
--
--   bound      its names are looked up once, here: `return` and `begin atomic`. For SQL functions that the planner puts
--              into the statement that calls them, which it does not do with a setting.
--   a setting  search_path = pg_catalog, pg_temp. pg_temp is named because it would come first otherwise, and last.
--
-- tests/security/test_functions.py fails on a function that has neither.

-- Bound ------------------------------------------------------------------------------------------

do $$
begin
    if current_setting('server_version_num')::integer >= 180000 then
        create or replace function dovecote.uuid_v7() returns uuid
        language sql volatile parallel safe return pg_catalog.uuidv7();
    else
        -- A random v4 uuid whose first 48 bits become the time in milliseconds and whose version becomes 7.
        create or replace function dovecote.uuid_v7() returns uuid
        language sql volatile parallel safe return encode(
            set_bit(set_bit(
                overlay(uuid_send(gen_random_uuid())
                        placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                        from 1 for 6),
                52, 1), 53, 1), 'hex')::uuid;
    end if;
end $$;

create or replace function dovecote.uuid_v7_floor(moment timestamptz) returns uuid
language sql immutable parallel safe
-- The least uuid of that millisecond: the border between two partitions.
return rpad(lpad(to_hex(floor(extract(epoch from moment) * 1000)::bigint), 12, '0'), 32, '0')::uuid;

create or replace function dovecote.uuid_v7_time(id uuid) returns timestamptz
language sql immutable parallel safe
return to_timestamp(('x' || encode(substring(uuid_send(id) from 1 for 6), 'hex'))::bit(48)::bigint / 1000.0);

create or replace function dovecote.floor_key(floor_position bigint) returns bigint
language sql immutable parallel safe return (17602::bigint << 48) | floor_position;

create or replace function dovecote.bell_key() returns bigint
language sql immutable parallel safe return 17603::bigint << 48;

create or replace function dovecote.leader_key() returns bigint
language sql immutable parallel safe return 17604::bigint << 48;

create or replace function dovecote.progress_key() returns bigint
language sql immutable parallel safe return 17608::bigint << 48;

create or replace function dovecote.release_key(handler text) returns bigint
language sql immutable parallel safe return (17607::bigint << 48) | (hashtext(handler)::bigint & 4294967295);

create or replace function dovecote.fact_of(event_type text) returns text
language sql immutable parallel safe
-- 'billing.payment_recorded' of 'billing.payment_recorded.v2'
return substring(event_type from '^(.*)[.]v[0-9]+$');

create or replace function dovecote.week_suffix(monday timestamptz) returns text
language sql immutable parallel safe return to_char(monday at time zone 'UTC', 'IYYY"w"IW');

create or replace function dovecote.week_monday(week text) returns timestamptz
language sql immutable parallel safe return to_date(week, 'IYYY"w"IW')::timestamp at time zone 'UTC';

create or replace function dovecote.stray_key(parent text) returns text
language sql immutable
return case parent when 'outbox' then 'id' when 'processed_events' then 'event_id'
                   when 'published_batches' then 'published_at' end;

-- A CloudEvents 1.0 JSON envelope. `position` is text because a CloudEvents integer has 32 bits.
-- Each field is escaped here, whatever let the row in, and the moment is in UTC, whatever the session's zone is.
-- The relay takes the id from where it stands (EVENT_ID in dovecote/relay/bundler.py).
create or replace function dovecote.envelope(fact dovecote.outbox) returns text
language sql stable parallel safe
return '{"specversion":"1.0","id":"' || fact.id::text
    || '","source":' || to_json('/dovecote/' || fact.aggregate_type)::text
    || ',"type":' || to_json(fact.event_type)::text
    || ',"subject":' || to_json(fact.aggregate_id)::text
    || ',"time":' || left(to_json(fact.created_at at time zone interval '0')::text, -1) || '+00:00"'
    || ',"dataschema":' || to_json('urn:dovecote:' || fact.event_type)::text
    || ',"position":"' || fact.position::text || '"'
    || coalesce(',"traceparent":' || (fact.headers -> 'traceparent')::text, '')
    || coalesce(',"tracestate":' || (fact.headers -> 'tracestate')::text, '')
    || coalesce(',"correlationid":' || (fact.headers -> 'correlation_id')::text, '')
    || ',"data":' || fact.payload::text || '}';

-- The envelope of a row that is small as it is stored; null for the others, which `envelopes` makes one by one. A
-- plain expression, so that it becomes part of the statement that reads. It is `envelope` without what costs most there,
-- to escape words: an aggregate type that is no word is for `envelopes`, and a type that is none is in no route, so that
-- nobody is sent what is made of it.
-- To quote an identifier is the cheapest question for a word; with the underscore it is no key word such as `order`.
create or replace function dovecote.small_envelope(fact dovecote.outbox) returns text
language sql stable parallel safe
return case
    when quote_ident(fact.aggregate_type || '_') = fact.aggregate_type || '_'
         and pg_column_compression(fact.payload) is null
         and pg_column_size(fact.payload) < 4000
         and pg_column_compression(fact.headers) is null
         and pg_column_size(fact.headers) < 4000
    then '{"specversion":"1.0","id":"' || fact.id::text
        || '","source":"/dovecote/' || fact.aggregate_type
        || '","type":"' || fact.event_type
        || '","subject":' || to_json(fact.aggregate_id)::text
        || ',"time":' || left(to_json(fact.created_at at time zone interval '0')::text, -1)
        || '+00:00","dataschema":"urn:dovecote:' || fact.event_type
        || '","position":"' || fact.position::text || '"'
        || coalesce(',"traceparent":' || (fact.headers -> 'traceparent')::text, '')
        || coalesce(',"tracestate":' || (fact.headers -> 'tracestate')::text, '')
        || coalesce(',"correlationid":' || (fact.headers -> 'correlation_id')::text, '')
        || ',"data":' || fact.payload::text || '}'
end;

-- A setting --------------------------------------------------------------------------------------

-- Writers' sessions.
alter function dovecote.announce set search_path = pg_catalog, pg_temp;
alter function dovecote.check_event set search_path = pg_catalog, pg_temp;
alter function dovecote.append_event set search_path = pg_catalog, pg_temp;
alter function dovecote.json_text_bytes set search_path = pg_catalog, pg_temp;
-- What they say of a moment is in UTC.
alter function dovecote.refusal set search_path = pg_catalog, pg_temp;
alter function dovecote.refusal set timezone = 'UTC';
alter function dovecote.refusal set datestyle = 'ISO';
alter function dovecote.refuse_dropped_week set search_path = pg_catalog, pg_temp;
alter function dovecote.refuse_dropped_week set timezone = 'UTC';
alter function dovecote.refuse_dropped_week set datestyle = 'ISO';

-- Sessions of the relay, the consumers, and people.
alter function dovecote.horizon set search_path = pg_catalog, pg_temp;
alter function dovecote.writers_at_work set search_path = pg_catalog, pg_temp;
alter function dovecote.wake set search_path = pg_catalog, pg_temp;
alter function dovecote.envelopes set search_path = pg_catalog, pg_temp;
alter function dovecote.message_bytes set search_path = pg_catalog, pg_temp;
alter function dovecote.blocker set search_path = pg_catalog, pg_temp;
alter function dovecote.blockers set search_path = pg_catalog, pg_temp;
alter function dovecote.release set search_path = pg_catalog, pg_temp;
alter function dovecote.release_next set search_path = pg_catalog, pg_temp;
alter function dovecote.release_parked set search_path = pg_catalog, pg_temp;
alter function dovecote.due_deliveries set search_path = pg_catalog, pg_temp;
alter function dovecote.due_retries set search_path = pg_catalog, pg_temp;
alter function dovecote.not_in_outbox set search_path = pg_catalog, pg_temp;
alter function dovecote.events_in set search_path = pg_catalog, pg_temp;
alter function dovecote.unsettled_of set search_path = pg_catalog, pg_temp;
alter function dovecote.look_again set search_path = pg_catalog, pg_temp;
alter function dovecote.move_marks set search_path = pg_catalog, pg_temp;
alter function dovecote.unprocessed set search_path = pg_catalog, pg_temp;
alter function dovecote.begin_progress set search_path = pg_catalog, pg_temp;
alter function dovecote.widen_progress set search_path = pg_catalog, pg_temp;
alter function dovecote.reopen_progress set search_path = pg_catalog, pg_temp;
alter function dovecote.skip_dropped_week set search_path = pg_catalog, pg_temp;
alter function dovecote.forget_handler set search_path = pg_catalog, pg_temp;
alter function dovecote.week_obstacles set search_path = pg_catalog, pg_temp;
alter function dovecote.idle_batches set search_path = pg_catalog, pg_temp;
-- Weeks begin and end in UTC: in another zone seven days may be an hour more or less, and a moment that is made a text
-- may be read as another one ('IST' is Israel's).
alter function dovecote.stray_weeks set search_path = pg_catalog, pg_temp;
alter function dovecote.stray_weeks set timezone = 'UTC';
alter function dovecote.stray_weeks set datestyle = 'ISO';
alter function dovecote.make_aside set search_path = pg_catalog, pg_temp;
alter function dovecote.make_aside set timezone = 'UTC';
alter function dovecote.make_aside set datestyle = 'ISO';
alter function dovecote.place_strays set search_path = pg_catalog, pg_temp;
alter function dovecote.place_strays set timezone = 'UTC';
alter function dovecote.place_strays set datestyle = 'ISO';

-- Bounds -----------------------------------------------------------------------------------------
-- What runs as the owner takes no lock for nothing, as it holds it until its caller's transaction ends, and no argument
-- without a bound.

create or replace function dovecote.ensure_partitions(weeks_ahead integer default 4) returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms' as $$
-- Make the partitions of last week, this week and `weeks_ahead` more; return how many weeks were new.
-- Last week too: an id may be a day older than the row.
-- Made aside and attached: CREATE ... PARTITION OF would wait for every open transaction that has written,
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
        -- Two at once would collide on the names. Attaching takes the same lock; nobody else may take it by hand.
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
                from (values ('outbox', dovecote.uuid_v7_floor(monday)::text,
                                        dovecote.uuid_v7_floor(monday + interval '7 days')::text),
                             ('processed_events', dovecote.uuid_v7_floor(monday)::text,
                                                  dovecote.uuid_v7_floor(monday + interval '7 days')::text),
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
            -- The default partition has taken in rows of that week already, or somebody reads in a long transaction.
            when check_violation or lock_not_available then
                raise warning 'the partitions of week % are not made: %', suffix, sqlerrm;
        end;
    end loop;
    return made;
end $$;

create or replace function dovecote.hold_week(week text) returns void
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
    if not pg_try_advisory_xact_lock(17606::bigint << 48) then
        raise exception 'another run of dovecote maintain is at work'
            using errcode = 'lock_not_available';
    end if;
    execute format('lock table dovecote.%I, dovecote.%I in share mode', 'outbox_' || week, 'processed_events_' || week);
end $$;

create or replace function dovecote.drop_week(
    week               text,
    dropped_by         text,
    archive            text   default null,
    checksum           text   default null,
    archived_events    bigint default null,
    archived_processed bigint default null
) returns dovecote.dropped_weeks
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '100ms' as $$
-- The only way a week goes: outbox, processed_events and what belongs to no other week of published_batches, at
-- once, with a line in dropped_weeks and one in audit_log. Refuses what is still needed, to every caller.
--
-- The long questions are asked while only the week itself is locked. The parents, where everybody writes, are asked
-- for with a tenth of a second's patience, again and again: DETACH CONCURRENTLY is not to be had beside a default
-- partition.
declare
    monday    timestamptz;
    lower_id  uuid;
    upper_id  uuid;
    in_the_way text;
    batches   text[];
    gone      dovecote.dropped_weeks;
begin
    -- Nobody here can open the archive. What is written down for ever is at least a path, and of the right number of rows.
    if dropped_by is null or length(dropped_by) not between 1 and 200 or dropped_by ~ '[[:cntrl:]]' then
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
    perform dovecote.hold_week(week);
    monday := dovecote.week_monday(week);
    lower_id := dovecote.uuid_v7_floor(monday);
    upper_id := dovecote.uuid_v7_floor(monday + interval '7 days');
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

create or replace function dovecote.copy_strays(most integer default 10000) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set lock_timeout = '500ms' as $$
-- Copy up to `most` rows of the default partitions to the partition their week is to have; return how many, 0 when
-- all are copied. Readers go on seeing the rows where they are.
declare
    part   record;
    monday timestamptz;
    aside  text;
    copied bigint;
begin
    if most is null or most not between 1 and 100000 then
        raise exception '1 to 100000 rows are copied at a time, not %', coalesce(most::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
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

create or replace function dovecote.processed_lately(seconds integer, pages integer default 128)
returns table (handler_name text, events_per_second float8)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
-- How fast each handler acts. New rows lie at the end of a partition's file, however old their event is: the last
-- pages tell it, without an index on the moment and without a look at the rest. Definer's rights because nobody
-- else may read a partition by its name.
declare
    part record;
begin
    if seconds is null or seconds not between 1 and 86400 or pages is null or pages not between 1 and 10000 then
        raise exception '1 to 86400 seconds and 1 to 10000 pages are looked at, not % and %',
                        coalesce(seconds::text, 'null'), coalesce(pages::text, 'null')
            using errcode = 'invalid_parameter_value';
    end if;
    for part in
        select inhrelid::regclass as name,
               greatest(0, pg_relation_size(inhrelid) / current_setting('block_size')::bigint - pages) as first_page
        from pg_inherits
        where inhparent = 'dovecote.processed_events'::regclass and pg_relation_size(inhrelid) > 0
    loop
        return query execute format(
            'with tail as materialized (select t.handler_name, t.processed_at from %s t where t.ctid >= %L::tid),
                  seen as (select greatest(clock_timestamp() - make_interval(secs => %s),
                                           case when %s > 0 then min(processed_at) end) as since from tail)
             select tail.handler_name,
                    count(*) / greatest(0.001, extract(epoch from clock_timestamp() - min(seen.since)))::float8
             from tail, seen where tail.processed_at >= seen.since group by 1',
            part.name, format('(%s,0)', part.first_page), seconds, part.first_page);
    end loop;
end $$;

create or replace function dovecote.recover_sequence(
    out handed_out_before bigint, out handed_out bigint, out highest_known bigint, out renumbered bigint
) returns record
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
-- Let positions be handed out in order, above all that are known, and give new ones to the events that were never read:
-- the relay then reads them as what they are, new. Old positions would hide them from handlers that subscribed later.
begin
    -- On a system that is well nothing is locked: the lock would stay until the caller's transaction ends.
    if dovecote.sequence_fault() is null and not exists (select from dovecote.never_read())
       and not exists (select from dovecote.relay_state s where s.refused_since is not null) then
        select s.handed_out, s.handed_out, s.highest_known, 0 into handed_out_before, handed_out, highest_known, renumbered
        from dovecote.sequence_state() s;
        return;
    end if;
    -- The lock waits for each transaction that has a position, and keeps new ones waiting until this one is over.
    -- Whatever a session has in its cache is forgotten with the change.
    alter sequence dovecote.outbox_position cache 1;
    select s.handed_out, s.highest_known into handed_out_before, highest_known from dovecote.sequence_state() s;
    if highest_known >= 1::bigint << 47 then
        raise exception 'position % was given by hand, and is above what positions may be (2^47)', highest_known
            using hint = 'Give its row a position of the sequence, as the owner of the schema, and call this again.';
    end if;
    execute format('alter sequence dovecote.outbox_position as bigint increment 1 minvalue 1 no maxvalue start 1 '
                   'restart %s cache 1 no cycle', highest_known + 1);
    -- As if it had been called, or the next writer would announce 0 (dovecote.announce).
    perform setval('dovecote.outbox_position', greatest(highest_known, 1), highest_known > 0);
    with found as materialized (
        select event_id, nextval('dovecote.outbox_position') as position
        from (select event_id from dovecote.never_read() order by created_at, was_position) in_order
    )
    update dovecote.outbox o set position = found.position from found where o.id = found.event_id;
    get diagnostics renumbered = row_count;
    handed_out := highest_known + renumbered;
    -- The relay that leads has read past them: its epoch is over. The next one asks what else is missing, from the beginning.
    update dovecote.relay_state set epoch = epoch + 1, redis_run_id = null, refused_since = null;
    perform dovecote.reopen_progress();
end $$;

-- Rights -----------------------------------------------------------------------------------------
-- Nothing for PUBLIC, neither now nor of what later revisions make: Postgres grants every new function to everybody. A
-- trigger runs without a right to its function, but what that function calls is called by the writer.

revoke execute on all functions in schema dovecote from public;
alter default privileges revoke execute on functions from public;

-- What only reckons, for everybody who is somebody here: column defaults and triggers are among it.
grant execute on function
    dovecote.uuid_v7, dovecote.uuid_v7_floor, dovecote.uuid_v7_time, dovecote.floor_key, dovecote.bell_key,
    dovecote.leader_key, dovecote.progress_key, dovecote.release_key, dovecote.fact_of, dovecote.week_suffix,
    dovecote.week_monday, dovecote.json_text_bytes, dovecote.refusal
    to dovecote_writer, dovecote_worker, dovecote_operator;

grant execute on function dovecote.append_event to dovecote_writer, dovecote_worker;

-- What only looks. Rows are seen as far as the caller may see them.
grant execute on function
    dovecote.envelope, dovecote.small_envelope, dovecote.envelopes, dovecote.message_bytes, dovecote.horizon,
    dovecote.writers_at_work, dovecote.blocker, dovecote.blockers, dovecote.wanted_since, dovecote.coarser,
    dovecote.absent, dovecote.events_in, dovecote.unsettled_of, dovecote.unprocessed, dovecote.settled_upto,
    dovecote.server_started, dovecote.server_run, dovecote.outbox_run, dovecote.not_in_outbox, dovecote.sequence_state,
    dovecote.sequence_fault, dovecote.never_read, dovecote.week_obstacles
    to dovecote_worker, dovecote_operator;

-- The relay's own; it changes as much as the caller may.
grant execute on function dovecote.look_again, dovecote.move_marks to dovecote_worker;
