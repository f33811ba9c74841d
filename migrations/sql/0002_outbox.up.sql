-- The outbox: what happened, written in the transaction that made it happen.
-- Append only. Partitioned by week on the UUIDv7 id, so old weeks are dropped, never deleted row by row.

-- Ids ------------------------------------------------------------------------------------------

create function dovecote.uuid_v7() returns uuid
language sql volatile parallel safe as $$
    -- A random v4 uuid whose first 48 bits become the time in milliseconds and whose version becomes 7.
    select encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                    placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                    from 1 for 6),
            52, 1), 53, 1), 'hex')::uuid
$$;

create function dovecote.uuid_v7_floor(moment timestamptz) returns uuid
language sql immutable parallel safe as $$
    -- The least uuid of that millisecond: the border between two partitions.
    select rpad(lpad(to_hex(floor(extract(epoch from moment) * 1000)::bigint), 12, '0'), 32, '0')::uuid
$$;

create function dovecote.uuid_v7_time(id uuid) returns timestamptz
language sql immutable parallel safe as $$
    select to_timestamp(('x' || encode(substring(uuid_send(id) from 1 for 6), 'hex'))::bit(48)::bigint / 1000.0)
$$;

-- The table ------------------------------------------------------------------------------------

-- Cache 1: a cached block of positions would be handed out long after its floor was announced.
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

comment on table dovecote.outbox is 'Facts in writing order; append only. See DESIGN sections 3 and 4.';

create index outbox_position_idx on dovecote.outbox (position);
-- Ordered handlers ask for the event before this one of the same aggregate.
create index outbox_aggregate_idx on dovecote.outbox (aggregate_type, aggregate_id, position);

-- Announcing a floor ---------------------------------------------------------------------------

-- One advisory lock key is 64 bits: 16 name the purpose, 48 carry a position (2.8e14 of them).
create function dovecote.floor_key(floor_position bigint) returns bigint
language sql immutable parallel safe as $$
    select (17602::bigint << 48) | floor_position
$$;

create function dovecote.bell_key() returns bigint
language sql immutable parallel safe as $$
    select 17603::bigint << 48
$$;

create function dovecote.leader_key() returns bigint
language sql immutable parallel safe as $$
    select 17604::bigint << 48
$$;

create function dovecote.announce() returns trigger
language plpgsql as $$
-- "Whatever I insert lies above this floor": taken before the first position of the transaction, held
-- until its end. Once a transaction is enough: its first floor is its lowest. A rollback to a savepoint
-- gives back lock and setting together.
-- Every writer pays for this function, so it is made of plain expressions, which plpgsql evaluates
-- without a query.
declare
    this_transaction constant text := pg_current_xact_id()::text;
    announced text;
begin
    if current_setting('dovecote.announced', true) is distinct from this_transaction then
        if not pg_try_advisory_xact_lock_shared(
                dovecote.floor_key(coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0))) then
            raise exception 'somebody holds a floor of the outbox exclusively, which nobody may';
        end if;
        announced := set_config('dovecote.announced', this_transaction, true);
        -- The bell rings only for a relay that sleeps: it then holds this key for itself.
        if not pg_try_advisory_xact_lock_shared(dovecote.bell_key()) then
            perform pg_notify('dovecote_outbox', '');
        end if;
    end if;
    return null;
end $$;

create trigger announce before insert on dovecote.outbox
    for each statement execute function dovecote.announce();

create function dovecote.check_event() returns trigger
language plpgsql as $$
-- What the outbox refuses, in words. One function instead of a constraint for each rule: Postgres prepares
-- every constraint anew for every statement, which cost a writer more than all of its inserts.
declare
    -- 48 bits of Unix milliseconds; meaningful for a UUIDv7 only.
    made_at constant bigint := ('x' || encode(substring(uuid_send(new.id) from 1 for 6), 'hex'))::bit(48)::bigint;
    problem constant text := case
        when get_byte(uuid_send(new.id), 6) >> 4 <> 7
            then format('id %s is not a UUIDv7; leave it out, or make one when the event is written', new.id)
        when abs(made_at - extract(epoch from now()) * 1000) > 86400000
            then format('id %s is of %s, more than a day from now; make it when the event is written',
                        new.id, dovecote.uuid_v7_time(new.id))
        when new.aggregate_type is null or new.aggregate_type !~ '^[a-z][a-z0-9_]{0,62}$'
            then format('aggregate_type %L is not a lower-case word such as ''membership''', new.aggregate_type)
        when new.aggregate_id is null or length(new.aggregate_id) not between 1 and 200
            then format('aggregate_id must have 1 to 200 characters, got %s',
                        coalesce(length(new.aggregate_id)::text, 'null'))
        when new.event_type is null or length(new.event_type) > 200
             or new.event_type !~ '^[a-z][a-z0-9_]*[.][a-z][a-z0-9_]*[.]v[1-9][0-9]*$'
            then format('event_type %L is not <slice>.<fact>.v<n> such as ''billing.payment_recorded.v1''',
                        left(new.event_type, 200))
        when new.payload is null or jsonb_typeof(new.payload) <> 'object'
            then format('payload must be a JSON object, got %s', coalesce(jsonb_typeof(new.payload), 'null'))
        when pg_column_size(new.payload) > 262144
            then format('payload has %s bytes, at most 262144 are taken', pg_column_size(new.payload))
        when new.headers is null or jsonb_typeof(new.headers) <> 'object'
            then format('headers must be a JSON object, got %s', coalesce(jsonb_typeof(new.headers), 'null'))
        when pg_column_size(new.headers) > 16384
            then format('headers have %s bytes, at most 16384 are taken', pg_column_size(new.headers))
    end;
begin
    if problem is not null then
        raise exception 'the outbox refuses the event: %', problem
            using errcode = 'check_violation', schema = 'dovecote', table = 'outbox';
    end if;
    return new;
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
language plpgsql as $$
declare
    event_id constant uuid := dovecote.uuid_v7();
begin
    insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (event_id, append_event.aggregate_type, append_event.aggregate_id, append_event.event_type,
            append_event.payload, coalesce(append_event.headers, '{}'));
    return event_id;
end $$;

comment on function dovecote.append_event is
    'Write one fact in the transaction at hand and return its id. What the outbox refuses, it refuses in words.';

-- What the relay reads -------------------------------------------------------------------------

create function dovecote.envelope(fact dovecote.outbox) returns text
language sql stable parallel safe as $$
    -- A CloudEvents 1.0 JSON envelope. `position` is text because a CloudEvents integer has 32 bits.
    -- Types and aggregate types need no escaping: check_event allows words only.
    select '{"specversion":"1.0","id":"' || fact.id::text
        || '","source":"/dovecote/' || fact.aggregate_type
        || '","type":"' || fact.event_type
        || '","subject":' || to_json(fact.aggregate_id)::text
        || ',"time":' || to_json(fact.created_at)::text
        || ',"dataschema":"urn:dovecote:' || fact.event_type
        || '","position":"' || fact.position::text || '"'
        || coalesce(',"traceparent":' || (fact.headers -> 'traceparent')::text, '')
        || coalesce(',"tracestate":' || (fact.headers -> 'tracestate')::text, '')
        || coalesce(',"correlationid":' || (fact.headers -> 'correlation_id')::text, '')
        || ',"data":' || fact.payload::text || '}'
$$;

create function dovecote.horizon(out last_position bigint, out settled bigint)
language plpgsql volatile as $$
-- `last_position`: the highest position handed out. `settled`: everything at or below it is committed
-- or gone for ever. The order is the proof: first the sequence, then the floors, and rows only after both.
declare
    lowest_floor bigint;
begin
    select case when is_called then last_value else 0 end into last_position from dovecote.outbox_position;
    select min(((classid::bigint & 65535) << 32) | objid::bigint) into lowest_floor
    from pg_locks
    where locktype = 'advisory' and objsubid = 1 and classid::bigint >> 16 = 17602
      and database = (select oid from pg_database where datname = current_database());
    settled := least(last_position, lowest_floor);
end $$;

-- What became of it ----------------------------------------------------------------------------

create table dovecote.processed_events (
    event_id     uuid        not null,
    handler_name text        not null,
    processed_at timestamptz not null default clock_timestamp(),
    replay_id    uuid,
    constraint processed_events_pkey primary key (event_id, handler_name)
) partition by range (event_id);

comment on table dovecote.processed_events is
    'Which handler has acted on which event; written first, in the transaction of the effect.';

create table dovecote.published_batches (
    positions    int8multirange not null,
    events       integer        not null,
    epoch        bigint         not null,
    published_at timestamptz    not null default clock_timestamp()
) partition by range (published_at);

comment on table dovecote.published_batches is 'One row per batch the relay published: the exact positions in it.';

create index published_batches_positions_idx on dovecote.published_batches using gist (positions);

create view dovecote.outbox_events as
    select o.*,
           (select min(b.published_at) from dovecote.published_batches b where b.positions @> o.position)
               as processed_at
    from dovecote.outbox o;

comment on view dovecote.outbox_events is 'The outbox as people ask for it: processed_at is when the relay published it.';

create table dovecote.deliveries (
    handler_name    text        not null,
    event_id        uuid        not null,
    position        bigint      not null,
    aggregate_type  text        not null,
    aggregate_id    text        not null,
    event_type      text        not null,
    state           text        not null,
    attempts        integer     not null default 0,
    next_attempt_at timestamptz,
    error_type      text,
    error_fingerprint text,
    error           text,
    trace_id        text,
    first_failed_at timestamptz not null default clock_timestamp(),
    updated_at      timestamptz not null default clock_timestamp(),
    constraint deliveries_pkey primary key (handler_name, event_id),
    constraint deliveries_state_is_known check (state in ('retrying', 'waiting', 'dead', 'discarded')),
    constraint deliveries_retrying_has_a_time check (state <> 'retrying' or next_attempt_at is not null)
);

comment on table dovecote.deliveries is 'Only what did not go well: retrying, waiting behind another, dead, discarded.';

create index deliveries_due_idx on dovecote.deliveries (next_attempt_at) where state = 'retrying';
create index deliveries_aggregate_idx
    on dovecote.deliveries (handler_name, aggregate_type, aggregate_id, position) where state = 'waiting';
create index deliveries_state_idx on dovecote.deliveries (handler_name, state, error_fingerprint);

-- Since when a handler wants events of a type. Those at or below `since_position` were told before: they are
-- none of its business, neither to send again nor to wait for.
create table dovecote.subscriptions (
    handler_name   text        not null,
    event_type     text        not null,
    since_position bigint      not null,
    created_at     timestamptz not null default clock_timestamp(),
    constraint subscriptions_pkey primary key (handler_name, event_type)
);

create function dovecote.blocker(
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
        order by o.position desc limit 1
    ) before
    where not exists (select from dovecote.processed_events p
                      where p.event_id = before.id and p.handler_name = handler)
      and not exists (select from dovecote.deliveries d
                      where d.event_id = before.id and d.handler_name = handler and d.state = 'discarded')
$$;

-- The relay and its operators ------------------------------------------------------------------

create table dovecote.relay_state (
    only_row     boolean     not null default true,
    checkpoint   bigint      not null default 0,
    epoch        bigint      not null default 0,
    owner        text,
    owned_since  timestamptz,
    seen_at      timestamptz,
    redis_run_id text,
    constraint relay_state_pkey primary key (only_row),
    constraint relay_state_has_one_row check (only_row)
) with (fillfactor = 10);

insert into dovecote.relay_state default values;

create table dovecote.replays (
    id           uuid        not null default dovecote.uuid_v7(),
    requested_by text        not null,
    reason       text        not null,
    strength     text        not null,
    handler_name text        not null,
    filter       jsonb       not null,
    state        text        not null default 'pending',
    total        bigint,
    done         bigint      not null default 0,
    cursor_position bigint   not null default 0,
    created_at   timestamptz not null default clock_timestamp(),
    updated_at   timestamptz not null default clock_timestamp(),
    constraint replays_pkey primary key (id),
    constraint replays_strength_is_known check (strength in ('missing', 'again')),
    constraint replays_state_is_known check (state in ('pending', 'running', 'paused', 'cancelled', 'done'))
);

create table dovecote.audit_log (
    id         uuid        not null default dovecote.uuid_v7(),
    at         timestamptz not null default clock_timestamp(),
    actor      text        not null,
    action     text        not null,
    reason     text,
    details    jsonb       not null default '{}',
    constraint audit_log_pkey primary key (id)
);

-- Partitions -----------------------------------------------------------------------------------

create table dovecote.outbox_default partition of dovecote.outbox default;
create table dovecote.processed_events_default partition of dovecote.processed_events default;
create table dovecote.published_batches_default partition of dovecote.published_batches default;

create function dovecote.ensure_partitions(weeks_ahead integer default 4) returns integer
language plpgsql security definer set search_path = pg_catalog, dovecote set lock_timeout = '500ms' as $$
-- Make the partitions of last week, this week and `weeks_ahead` more; return how many weeks were new.
-- Last week too: an id may be a day older than the row.
-- Made aside and attached: CREATE ... PARTITION OF would wait for every open transaction that has written,
-- and all writers would wait for it.
declare
    made   integer := 0;
    monday timestamptz;
    suffix text;
    part   record;
begin
    perform pg_advisory_xact_lock(17605::bigint << 48);  -- two at once would collide on the names
    for week in -1 .. weeks_ahead loop
        monday := (date_trunc('week', now() at time zone 'UTC') + make_interval(weeks => week)) at time zone 'UTC';
        suffix := to_char(monday at time zone 'UTC', 'IYYY"w"IW');
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

select dovecote.ensure_partitions();

-- Rights ---------------------------------------------------------------------------------------
-- On the parents only: a row put straight into a partition would not announce its floor.

revoke all on function dovecote.ensure_partitions from public;

-- Not the position: one of a writer's own choice could lie where the relay has already been.
grant insert (id, aggregate_type, aggregate_id, event_type, payload, headers, created_at)
    on dovecote.outbox to dovecote_writer, dovecote_worker;
grant usage, select on sequence dovecote.outbox_position to dovecote_writer, dovecote_worker;

grant select on dovecote.outbox, dovecote.outbox_events, dovecote.processed_events, dovecote.published_batches,
                dovecote.deliveries, dovecote.subscriptions, dovecote.relay_state, dovecote.replays, dovecote.audit_log
    to dovecote_worker, dovecote_operator;
grant select on sequence dovecote.outbox_position to dovecote_operator;
grant insert, update on dovecote.processed_events to dovecote_worker;
grant insert on dovecote.published_batches to dovecote_worker;
grant insert, update, delete on dovecote.deliveries to dovecote_worker, dovecote_operator;
grant update on dovecote.relay_state to dovecote_worker;
grant insert on dovecote.subscriptions to dovecote_worker;
grant insert, update on dovecote.replays to dovecote_worker, dovecote_operator;
grant insert on dovecote.audit_log to dovecote_worker, dovecote_operator;
grant execute on function dovecote.ensure_partitions to dovecote_worker, dovecote_operator;
