-- The outbox: what happened, written in the transaction that made it happen.
-- Append only. Partitioned by week on the UUIDv7 id, so old weeks are dropped, never deleted row by row.
--
-- Functions mean the same whatever the caller's session says (docs/adr/0033). A name without a schema is looked up in
-- the caller's search_path when the statement runs: a temporary table, or a function in a schema of the caller, then
-- takes the place of Postgres's own. Two cures, and each function of ours has one:
--
--   bound      its names are looked up once, when it is made: `return` and `begin atomic`. For SQL functions that the
--              planner puts into the statement that calls them, which it does not do with a setting.
--   a setting  search_path = pg_catalog, pg_temp. pg_temp is named because it would come first otherwise, and last.
--
-- tests/security/test_functions.py fails on a function that has neither.

-- Nothing for PUBLIC: Postgres grants every new function to everybody. A trigger runs without a right to its function,
-- but what that function calls is called by the writer.
alter default privileges revoke execute on functions from public;

-- Ids ------------------------------------------------------------------------------------------

do $$
begin
    if current_setting('server_version_num')::integer >= 180000 then
        create function dovecote.uuid_v7() returns uuid
        language sql volatile parallel safe return pg_catalog.uuidv7();
    else
        -- A random v4 uuid whose first 48 bits become the time in milliseconds and whose version becomes 7.
        create function dovecote.uuid_v7() returns uuid
        language sql volatile parallel safe return encode(
            set_bit(set_bit(
                overlay(uuid_send(gen_random_uuid())
                        placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                        from 1 for 6),
                52, 1), 53, 1), 'hex')::uuid;
    end if;
end $$;

create function dovecote.uuid_v7_lower_bound(at timestamptz) returns uuid
language sql immutable parallel safe
-- The least uuid of that millisecond: the border between two partitions.
return rpad(lpad(to_hex(floor(extract(epoch from at) * 1000)::bigint), 12, '0'), 32, '0')::uuid;

create function dovecote.uuid_v7_time(id uuid) returns timestamptz
language sql immutable parallel safe
return to_timestamp(('x' || encode(substring(uuid_send(id) from 1 for 6), 'hex'))::bit(48)::bigint / 1000.0);

-- The table ------------------------------------------------------------------------------------

-- Cache 1: a cached block of positions would be handed out long after the writer announced its low-water mark.
create sequence dovecote.outbox_position as bigint cache 1;

create table dovecote.outbox (
    id             uuid        not null default dovecote.uuid_v7(),
    position       bigint      not null default nextval('dovecote.outbox_position'),
    aggregate_type text        not null,
    aggregate_id   text        not null,
    event_type     text        not null,
    payload        jsonb       not null,
    headers        jsonb       not null default '{}',
    created_at     timestamptz not null default clock_timestamp(),
    constraint outbox_pkey primary key (id)
) partition by range (id);

create table dovecote.outbox_default partition of dovecote.outbox default;

comment on table dovecote.outbox is 'Events in writing order; append only.';

create index outbox_position_idx on dovecote.outbox (position);
-- Ordered handlers ask for the event before this one of the same aggregate.
create index outbox_aggregate_idx on dovecote.outbox (aggregate_type, aggregate_id, position);

-- Wake-ups -------------------------------------------------------------------------------------
-- A wake-up never fails the transaction that it follows.
--
-- Postgres has one queue of notifications for the whole cluster. It is as long as its slowest listener makes it: one that
-- stays in a transaction keeps all of it, and when it is full every NOTIFY fails, at COMMIT. Polling finds
-- events without a notification, so from half of the queue on none is sent. The other half is room for notifications
-- of open transactions: with Postgres's default size, 8 GB, for some 100 million of them.

create function dovecote.wake(channel text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Notify, unless that might fail. The query for the usage also frees what every listener has read: otherwise only
-- a NOTIFY that commits does that, and none can while the queue is full.
begin
    if pg_catalog.float8lt(pg_catalog.pg_notification_queue_usage(), 0.5) then
        perform pg_catalog.pg_notify(channel, '');
    end if;
end $$;

comment on function dovecote.wake is 'Notify a channel of ours, unless the queue of notifications is half full.';

create function dovecote.wakeup_key() returns bigint
language sql immutable parallel safe return 17603::bigint << 48;

-- Announcing a low-water mark ------------------------------------------------------------------
-- Every writer pays for this. In each transaction plpgsql prepares every expression that it evaluates anew, so the size
-- of an expression costs more than its evaluation. The ordinary path is therefore short, and the text of a refusal is
-- made only when there is one.

-- One advisory lock key is 64 bits: 16 name the purpose, 48 carry a position (2.8e14 of them).
create function dovecote.writer_key(low_water_mark bigint) returns bigint
language sql immutable parallel safe return (17602::bigint << 48) | low_water_mark;

create function dovecote.announce() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- "Whatever I insert lies above this position": taken before the first position of the transaction, held until its end.
-- Once a transaction is enough: its first announcement is its lowest. A rollback to a savepoint gives back lock and
-- setting together. Anybody may write the setting: it says which lock to take once more, which costs nothing where it
-- is held. An announcement at a lower position is as good.
declare
    before constant text := current_setting('dovecote.announced', true);
    announced     bigint;
    last_position bigint;
begin
    if before <> '' then
        -- What is no number is not announced: a session of a pool may be another's before.
        announced := case when before ~ '^[0-9]{1,15}$' then before end;
        if pg_current_xact_id() is not null
           and (announced between 0 and pg_sequence_last_value('dovecote.outbox_position')
                or announced between 1::bigint << 47 and (1::bigint << 48) - 1)
           and pg_try_advisory_xact_lock_shared(dovecote.writer_key(announced)) then
            return null;
        end if;
    end if;
    -- The number of the transaction first: dovecote.active_writers() treats an announcement without one as ended.
    last_position := case when pg_current_xact_id() is not null
                     then coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0) end;
    announced := last_position;
    if not pg_try_advisory_xact_lock_shared(dovecote.writer_key(announced)) then
        -- A foreign session holds the lock. A session cannot hold most of the locks below, and none can hold most of
        -- those from 2^47 on, which announce a writer at an unknown position.
        for try in 1 .. 10 loop
            announced := case when try <= 2 then last_position - floor(random() * least(last_position, 100000))::bigint
                         else (1::bigint << 47) + floor(random() * (1::bigint << 47))::bigint end;
            exit when pg_try_advisory_xact_lock_shared(dovecote.writer_key(announced));
            if try = 10 then
                raise exception 'no announcement could be made: other sessions hold each lock that was tried'
                    using hint = 'select * from dovecote.foreign_locks() names them.', errcode = 'lock_not_available';
            end if;
        end loop;
    end if;
    -- An assignment: perform would be a query.
    last_position := length(set_config('dovecote.announced', announced::text, true));
    -- A relay that sleeps holds this key for itself, and is woken. The key is given back at once, in the same
    -- expression, where nothing can be interrupted: held to the end it would keep the relay from sleeping. The
    -- announcement comes first: by it a relay that falls asleep now knows that we shall say nothing.
    if (case when pg_try_advisory_lock_shared(dovecote.wakeup_key())
             then not pg_advisory_unlock_shared(dovecote.wakeup_key()) else true end) then
        -- As in dovecote.wake; a call of it would be a query.
        if float8lt(pg_notification_queue_usage(), 0.5) then
            perform pg_notify('dovecote_outbox', '');
        end if;
    end if;
    return null;
end $$;

create trigger announce before insert on dovecote.outbox
    for each statement execute function dovecote.announce();

-- What the outbox takes ------------------------------------------------------------------------
-- Sizes are limited in the form that is worked with: the text of payload and headers, which is what travels. In the
-- column a value may be compressed, and a number of twelve bytes there, such as 1e131071, is 131 kB as text.

create function dovecote.json_text_bytes(value jsonb, most integer) returns bigint
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
-- The length of the value as text, in bytes; null where it is plain without that text that it is longer than `most`,
-- and where Postgres cannot make the text at all. No text far beyond `most` is made: a gigabyte of it could cost a small
-- machine its Postgres.
declare
    -- What it is when it is not compressed. Its text has at least a quarter of these bytes: "0, " takes twelve here.
    stored constant integer := pg_column_size(value #> '{}');
    numbers jsonb;
    bytes bigint := 0;
begin
    if stored > 4 * most + 1000 then
        return null;
    end if;
    -- With less than that, the longest numbers make 100 MB. In more they are added up, a few at once.
    if stored > 8000 then
        numbers := jsonb_path_query_array(value, 'strict $.** ? (@.type() == "number")');
        for low in 0 .. jsonb_array_length(numbers) - 1 by 250 loop
            bytes := bytes + octet_length(jsonb_path_query_array(
                numbers, '$[$low to $high]', jsonb_build_object('low', low, 'high', low + 249))::text);
            if bytes > 2::bigint * most then
                return null;  -- twice: near the limit the exact length is reported
            end if;
        end loop;
    end if;
    return octet_length(value::text);
exception
    when program_limit_exceeded or statement_too_complex then
        return null;  -- nested too deeply
end $$;

create function dovecote.refusal(event dovecote.outbox) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
-- The reason for which the outbox refuses an event; null when it accepts it. The rules are check_event's.
declare
    bytes bigint;
begin
    if event.id is null then
        return 'id is null; leave it out';
    elsif get_byte(uuid_send(event.id), 6) >> 4 <> 7 then
        return format('id %s is not a UUIDv7; leave it out, or make one when the event is written', event.id);
    elsif abs(extract(epoch from dovecote.uuid_v7_time(event.id) - now())) > 86400 then
        return format('id %s is of %s, more than a day from now; make it when the event is written',
                      event.id, dovecote.uuid_v7_time(event.id));
    elsif event.aggregate_type is null or event.aggregate_type !~ '^[a-z][a-z0-9_]{0,62}$' then
        return format('aggregate_type %L is not a lower-case word such as ''membership''', event.aggregate_type);
    elsif event.aggregate_id is null or length(event.aggregate_id) not between 1 and 200 then
        return format('aggregate_id must have 1 to 200 characters, got %s',
                      coalesce(length(event.aggregate_id)::text, 'null'));
    elsif event.event_type is null or length(event.event_type) > 200
          or event.event_type !~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$' then
        return format('event_type %L is not <slice>.<event>.v<n> such as ''billing.payment_recorded.v1''',
                      left(event.event_type, 200));
    elsif event.payload is null or jsonb_typeof(event.payload) <> 'object' then
        return format('payload must be a JSON object, got %s', coalesce(jsonb_typeof(event.payload), 'null'));
    elsif event.headers is null or jsonb_typeof(event.headers) <> 'object' then
        return format('headers must be a JSON object, got %s', coalesce(jsonb_typeof(event.headers), 'null'));
    end if;
    bytes := dovecote.json_text_bytes(event.payload, 262144);
    if bytes is null or bytes > 262144 then
        return format('payload has %s bytes as text, at most 262144 are taken', coalesce(bytes::text, 'far more than 262144'));
    end if;
    bytes := dovecote.json_text_bytes(event.headers, 16384);
    if bytes is null or bytes > 16384 then
        return format('headers have %s bytes as text, at most 16384 are taken', coalesce(bytes::text, 'far more than 16384'));
    end if;
    return null;
end $$;

create function dovecote.check_event() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- What the outbox takes. Null is not true: what is missing is refused.
declare
    problem text;
begin
    if pg_catalog.get_byte(pg_catalog.uuid_send(new.id), 6) >> 4 = 7
       -- The first 48 bits of a UUIDv7 are Unix milliseconds; a day is 86,400,000 of them.
       and pg_catalog.abs(('x' || pg_catalog.encode(pg_catalog.substring(pg_catalog.uuid_send(new.id), 1, 6), 'hex'))::bit(48)::bigint
                          - pg_catalog.date_part('epoch', pg_catalog.now()) * 1000) <= 86400000
       -- A bound inside of the pattern, {0,62}, would take three times as long.
       and new.aggregate_type ~ '^[a-z][a-z0-9_]*$' and pg_catalog.length(new.aggregate_type) <= 63
       and pg_catalog.length(new.aggregate_id) between 1 and 200
       and new.event_type ~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$'
       and pg_catalog.length(new.event_type) <= 200
       and pg_catalog.jsonb_typeof(new.payload) = 'object' and pg_catalog.jsonb_typeof(new.headers) = 'object'
       -- Little enough to be made a text without a second thought: as a C string, with its zero at the end, in half
       -- the time. What is larger, or comes compressed from another table, is for `refusal` to judge.
       and pg_catalog.pg_column_compression(new.payload) is null
       and pg_catalog.pg_column_compression(new.headers) is null
       and pg_catalog.pg_column_size(new.payload) + pg_catalog.pg_column_size(new.headers) <= 8000
       and pg_catalog.pg_column_size(pg_catalog.jsonb_out(new.payload)) <= 262145
       and pg_catalog.pg_column_size(pg_catalog.jsonb_out(new.headers)) <= 16385
    then
        return new;
    end if;
    problem := dovecote.refusal(new);
    if problem is null then
        return new;
    end if;
    raise exception 'the outbox refuses the event: %', problem
        using errcode = 'check_violation', schema = 'dovecote', table = 'outbox';
end $$;

create trigger check_event before insert on dovecote.outbox
    for each row execute function dovecote.check_event();

-- The front door for every language ------------------------------------------------------------

create function dovecote.append_event(
    aggregate_type text,
    aggregate_id   text,
    event_type     text,
    payload        jsonb,
    headers        jsonb default '{}'
) returns uuid
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    event_id constant uuid := dovecote.uuid_v7();
begin
    insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (event_id, append_event.aggregate_type, append_event.aggregate_id, append_event.event_type,
            append_event.payload, coalesce(append_event.headers, '{}'));
    return event_id;
end $$;

comment on function dovecote.append_event is
    'Write one event in the transaction at hand and return its id. What the outbox refuses, it refuses in words.';

-- Rights ---------------------------------------------------------------------------------------
-- On the parents only: an insert directly into a partition would not announce a low-water mark. A writer chooses neither
-- the position, which could lie where the relay has already read, nor the time, which the server sets.

grant select on dovecote.outbox to dovecote_worker, dovecote_operator, dovecote_viewer;
grant insert (id, aggregate_type, aggregate_id, event_type, payload, headers)
    on dovecote.outbox to dovecote_writer, dovecote_service, dovecote_worker;
grant select on sequence dovecote.outbox_position to dovecote_operator, dovecote_viewer;
grant usage, select on sequence dovecote.outbox_position to dovecote_writer, dovecote_service, dovecote_worker;
grant execute on function
    dovecote.uuid_v7, dovecote.uuid_v7_lower_bound, dovecote.uuid_v7_time, dovecote.wakeup_key, dovecote.writer_key,
    dovecote.json_text_bytes
    to dovecote_writer, dovecote_service, dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.wake to dovecote_writer, dovecote_worker, dovecote_operator;
grant execute on function dovecote.refusal to dovecote_writer, dovecote_service, dovecote_worker, dovecote_operator;
grant execute on function dovecote.append_event to dovecote_writer, dovecote_service, dovecote_worker;
