-- The relay's state and queries: its checkpoint, the leader, the active writers, the run of Postgres, and the
-- envelopes that it sends.

-- How far it is --------------------------------------------------------------------------------

create table dovecote.relay_state (
    only_row     boolean     not null default true,
    checkpoint   bigint      not null default 0,
    epoch        bigint      not null default 0,
    owner        text,
    owned_since  timestamptz,
    seen_at      timestamptz,
    redis_run_id text,
    history      text,
    instance     text,
    stands_back_for text,
    refused_since timestamptz,
    -- The last epoch whose leader signed its messages. A relay of an older version does not write it, so the next leader
    -- finds it too old: consumers refuse what that relay has queued.
    signed_epoch bigint,
    constraint relay_state_pkey primary key (only_row),
    constraint relay_state_has_one_row check (only_row)
) with (fillfactor = 10);

comment on column dovecote.relay_state.history is
    'Redis holds what was published in this history, and names it. Another begins when either may have lost data.';
comment on column dovecote.relay_state.instance is 'server_run() in which the history began or was last found as known.';
comment on column dovecote.relay_state.stands_back_for is
    'server_run() of the newer Postgres whose relay uses our Redis; ours does not publish meanwhile.';
comment on column dovecote.relay_state.refused_since is
    'Since when relays have refused to lead because of the sequence; null once dovecote.recover_sequence() was called.';

insert into dovecote.relay_state default values;

create table dovecote.published_batches (
    positions    int8multirange not null,
    events       integer        not null,
    epoch        bigint         not null,
    published_at timestamptz    not null default clock_timestamp()
) partition by range (published_at);

create table dovecote.published_batches_default partition of dovecote.published_batches default;

comment on table dovecote.published_batches is 'One row per batch the relay published: the exact positions in it.';

create index published_batches_positions_idx on dovecote.published_batches using gist (positions);
-- How much was published lately.
create index published_batches_published_at_idx on dovecote.published_batches (published_at);

create view dovecote.outbox_events as
    select o.*,
           (select min(b.published_at) from dovecote.published_batches b where b.positions @> o.position)
               as published_at
    from dovecote.outbox o;

comment on view dovecote.outbox_events is 'The outbox as people ask for it: published_at is when the relay published it.';

create table dovecote.unrouted_types (
    event_type     text        not null,
    events         bigint      not null,
    first_position bigint      not null,
    last_position  bigint      not null,
    first_seen_at  timestamptz not null default clock_timestamp(),
    last_seen_at   timestamptz not null default clock_timestamp(),
    constraint unrouted_types_pkey primary key (event_type)
);

comment on table dovecote.unrouted_types is
    'Types that the relay met and no handler wanted then: the events are in the outbox. `events` is about.';

-- Handlers whose queue is full.
create table dovecote.postponed (
    handler_name   text        not null,
    after_position bigint      not null,
    since          timestamptz not null default clock_timestamp(),
    constraint postponed_pkey primary key (handler_name)
);

comment on table dovecote.postponed is
    'Handlers that the relay sends nothing more for now, because their queue is full: no row for all others.';
comment on column dovecote.postponed.after_position is
    'What is published up to here was sent to the handler as well. What lies above is sent from the outbox, in order, '
    'when its queue has room.';

-- Who leads ------------------------------------------------------------------------------------
-- Locks that need a privilege (docs/adr/0036). Every login that may connect can take any advisory lock. A table lock
-- needs a privilege on the table. Each lock of ours is on a view of its own, taken in SHARE UPDATE EXCLUSIVE mode:
--
--   a view    has no rows, so it needs no vacuum and no freezing, which would wait for a lock that is held for months
--   the mode  conflicts with itself, and not with what PREPARE takes without any privilege: ACCESS SHARE, ROW SHARE, ROW
--             EXCLUSIVE
--
-- A transaction that holds nothing else has neither an xid nor a snapshot: it does not delay vacuum.

create view dovecote.relay_leader as select 'held by the relay that leads' as purpose;

comment on view dovecote.relay_leader is 'The relay that leads holds a lock on it: `select * from dovecote.leader()`.';

create function dovecote.try_lock(name text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Take one of the locks above until the end of the transaction, if it is free; with the caller's rights.
begin
    execute format('lock table dovecote.%I in share update exclusive mode nowait', name);
    return true;
exception
    when lock_not_available then
        return false;
end $$;

-- The session that holds the lock of the relay that leads; no row while none does. `silent_seconds` since it has asked
-- something, null for a login that may not see that.
create function dovecote.leader()
returns table (pid integer, login text, application text, silent_seconds float8)
language sql stable
begin atomic
    select l.pid, a.usename::text, a.application_name, extract(epoch from clock_timestamp() - a.query_start)::float8
    from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a on a.pid = l.pid
    where l.granted and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
      and l.locktype = 'relation' and l.relation = 'dovecote.relay_leader'::regclass
      and l.mode = 'ShareUpdateExclusiveLock';
end;

-- Who writes -----------------------------------------------------------------------------------
-- Reading beside held writers and rolled-back ones at no cost: dovecote/store/reader.py, gaps.py and
-- dovecote/relay/leader.py.
--
-- A shared lock announces a position if its transaction also has the lock on dovecote.outbox that every INSERT takes
-- before its triggers are called, and keeps. That one needs a privilege on the outbox or the schema.
--
-- pg_locks reads relation locks first: if it misses the lock of a transaction on the outbox, its positions are above the
-- sequence as it was read before. PREPARE TRANSACTION transfers the locks one by one, and each keeps the number of the
-- virtual transaction.
--
-- From 2^47 on, above all possible positions, it announces an active writer at an unknown position.

create function dovecote.low_watermark(out last_position bigint, out safe_position bigint)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- `last_position`: the highest position handed out. `safe_position`: everything at or below it is committed
-- or gone for ever. The order is the proof: first the sequence, then what writers announce, and rows only after both.
declare
    lowest bigint;
begin
    -- Not called since setval(..., false) or RESTART: the value is the next one.
    select case when s.is_called then s.last_value else s.last_value - 1 end into last_position
    from dovecote.outbox_position s;
    select min(h.announced) into lowest
    from (
        select min(case when l.classid::bigint & 32768 = 0
                        then ((l.classid::bigint & 65535) << 32) | l.objid::bigint else 0 end)
                   filter (where l.locktype = 'advisory') as announced,
               bool_or(l.locktype = 'relation') as inserts
        from pg_locks l
        where l.database = (select d.oid from pg_database d where d.datname = current_database())
          and (l.locktype = 'advisory' and l.objsubid = 1 and l.classid::bigint >> 16 = 17602 and l.mode = 'ShareLock'
            or l.locktype = 'relation' and l.relation = 'dovecote.outbox'::regclass and l.mode = 'RowExclusiveLock')
        group by l.virtualtransaction
    ) h
    where h.inserts;
    safe_position := least(last_position, lowest);
end $$;

create function dovecote.active_writers(out positions bigint[], out xids bigint[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Each active writer: the position it has announced, and its transaction. One that holds its announcement and no number
-- of a transaction any more is over: numbers are given back first.
-- Savepoints hold numbers too, all above that of their transaction: the lowest of a holder is the transaction's.
-- pg_locks shows the lower 32 of 64 bits. Shifted up and down they are the signed distance from the number of now.
declare
    now_xid constant bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
begin
    select coalesce(array_agg(h.announced), '{}'), coalesce(array_agg(h.xid), '{}') into positions, xids
    from (
        select min(case when l.classid::bigint & 32768 = 0
                        then ((l.classid::bigint & 65535) << 32) | l.objid::bigint else 0 end)
                   filter (where l.locktype = 'advisory') as announced,
               min(now_xid + (((l.transactionid::text::bigint - now_xid) << 32) >> 32)) as xid,
               bool_or(l.locktype = 'relation') as inserts
        from pg_locks l
        where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock'
           or l.database = (select d.oid from pg_database d where d.datname = current_database())
              and (l.locktype = 'advisory' and l.objsubid = 1 and l.classid::bigint >> 16 = 17602 and l.mode = 'ShareLock'
                or l.locktype = 'relation' and l.relation = 'dovecote.outbox'::regclass
                   and l.mode = 'RowExclusiveLock')
        group by l.virtualtransaction
    ) h
    where h.announced is not null and h.xid is not null and h.inserts;
end $$;

-- Which run of Postgres this is ------------------------------------------------------------------
-- And the history in which Redis was filled.

create function dovecote.server_started() returns bigint
language sql stable parallel safe
begin atomic
    -- Unix microseconds. All processes begin anew when one was killed, though the postmaster stays: so do its statistics.
    select (extract(epoch from greatest(pg_catalog.pg_postmaster_start_time(),
                                        pg_catalog.pg_stat_get_bgwriter_stat_reset_time())) * 1000000)::bigint;
end;

comment on function dovecote.server_started is
    'When this run of Postgres began. What a session has seen committed is lost only with the run: by a crash, a '
    'restore, a failover.';

create function dovecote.server_run() returns text
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    system bigint := 0;
    timeline bigint := 0;
begin
    -- A managed Postgres may refuse either, and a standby the second. The start is known in any case.
    begin
        system := (select system_identifier from pg_control_system());
    exception when others then null;
    end;
    begin
        -- pg_control_checkpoint() shows the timeline of before for a while after a promotion; pg_walfile_name() does not.
        timeline := ('x' || substring(pg_walfile_name(pg_current_wal_insert_lsn()) from 1 for 8))::bit(32)::bigint;
    exception when others then null;
    end;
    -- A dump that is restored on the server it was taken from is in no other run of it. It is in another database, or
    -- at least in another file.
    return concat_ws(' ', system, timeline, dovecote.server_started(),
        (select oid from pg_database where datname = current_database()),
        pg_relation_filenode('dovecote.relay_state'));
end $$;

comment on function dovecote.server_run is
    'Which run of which database this is: system identifier, timeline, start, database, file of relay_state. Another '
    'one may have lost what this one reported.';

-- How far Postgres is, written to Redis once it is on disk. A sequence keeps no old versions, and setval() logs each value
-- where nextval() would log 32 ahead.
create sequence dovecote.relay_heartbeat as bigint minvalue 0 start 0 cache 1;

comment on sequence dovecote.relay_heartbeat is
    'Moves at most once a second while messages are under way: first here, then in Redis. Should either go back without '
    'another run, the two differ.';

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
-- Volatile: its statement takes its snapshot after its locks. A row that dovecote.place_misplaced_rows moves would be seen in
-- neither place by a snapshot from before.
language plpgsql volatile
-- Mostly all of them are there.
rows 1
-- One plan, made once: Postgres would go on making a new one for each call, over all weeks. In that one plan the range of
-- ids leaves out the weeks that hold none of them, and the id of each event all weeks but its own.
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan set enable_bitmapscan = off
set enable_seqscan = off as $$
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
    'Which of these events are not in the outbox with this id, position and type: Postgres has lost them, or never '
    'knew them.';

-- What it sends -----------------------------------------------------------------------------

-- A CloudEvents 1.0 JSON envelope. `position` is text because a CloudEvents integer has 32 bits.
-- Each field is escaped here, whatever let the row in, and the time is in UTC, whatever the session's zone is.
-- The relay takes the id from where it stands (EVENT_ID in dovecote/relay/bundler.py).
create function dovecote.envelope(event dovecote.outbox) returns text
language sql stable parallel safe
return '{"specversion":"1.0","id":"' || event.id::text
    || '","source":' || to_json('/dovecote/' || event.aggregate_type)::text
    || ',"type":' || to_json(event.event_type)::text
    || ',"subject":' || to_json(event.aggregate_id)::text
    || ',"time":' || left(to_json(event.created_at at time zone interval '0')::text, -1) || '+00:00"'
    || ',"dataschema":' || to_json('urn:dovecote:' || event.event_type)::text
    || ',"position":"' || event.position::text || '"'
    || coalesce(',"traceparent":' || (event.headers -> 'traceparent')::text, '')
    || coalesce(',"tracestate":' || (event.headers -> 'tracestate')::text, '')
    || coalesce(',"correlationid":' || (event.headers -> 'correlation_id')::text, '')
    || ',"data":' || event.payload::text || '}';

-- The envelope of a row that is small as it is stored; null for the others, which `envelopes` makes one by one. A
-- plain expression, so that it becomes part of the statement that reads. It is `envelope` without its most
-- expensive part, escaping: an aggregate type that is not a plain word is left to `envelopes`, and an event type that is
-- not one is in no route, so its envelope is never sent.
-- quote_ident is the cheapest test for a plain word; with the underscore it is no keyword such as `order`.
create function dovecote.small_envelope(event dovecote.outbox) returns text
language sql stable parallel safe
return case
    when quote_ident(event.aggregate_type || '_') = event.aggregate_type || '_'
         and pg_column_compression(event.payload) is null
         and pg_column_size(event.payload) < 4000
         and pg_column_compression(event.headers) is null
         and pg_column_size(event.headers) < 4000
    then '{"specversion":"1.0","id":"' || event.id::text
        || '","source":"/dovecote/' || event.aggregate_type
        || '","type":"' || event.event_type
        || '","subject":' || to_json(event.aggregate_id)::text
        || ',"time":' || left(to_json(event.created_at at time zone interval '0')::text, -1)
        || '+00:00","dataschema":"urn:dovecote:' || event.event_type
        || '","position":"' || event.position::text || '"'
        || coalesce(',"traceparent":' || (event.headers -> 'traceparent')::text, '')
        || coalesce(',"tracestate":' || (event.headers -> 'tracestate')::text, '')
        || coalesce(',"correlationid":' || (event.headers -> 'correlation_id')::text, '')
        || ',"data":' || event.payload::text || '}'
end;

create function dovecote.envelopes(ids uuid[], max_bytes bigint)
returns table (envelope bytea, problem text)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
-- The envelopes of these events in UTF-8, in this order: at least one, and no more once they have `max_bytes`, or
-- once twenty could not be made, which may have taken a second.
-- Where it cannot be made, or would have more bytes than any message has room for, `problem` says why, and the others
-- are made all the same.
declare
    -- Of one envelope. What check_event lets in stays far below; this is for what has come past it, as in a restore.
    max_bytes_of_one constant integer := 1000000;
    made bigint := 0;
    failed integer := 0;
    event dovecote.outbox;
begin
    for event in
        select o.* from unnest(ids) with ordinality as wanted (id, place)
        left join lateral (select * from dovecote.outbox where id = wanted.id limit 1) o on true order by place
    loop
        envelope := null;
        problem := null;
        begin
            if event.id is null then
                problem := 'it is not in the outbox any more';
            elsif event.aggregate_type !~ '^[a-z0-9_]+$' or event.event_type !~ '^[a-z0-9_.]+$' then
                problem := 'its aggregate_type or event_type is no lower-case word';
            else
                event.payload := event.payload #> '{}';  -- not compressed any more: it is looked at several times
                -- Less than that becomes no text that would be too much to make.
                if pg_column_size(event.payload) > 8000
                   and dovecote.json_text_bytes(event.payload, max_bytes_of_one) is null then
                    problem := format('its payload has more than %s bytes as text', max_bytes_of_one);
                elsif pg_column_size(event.headers) > 100
                   and dovecote.json_text_bytes(event.headers, max_bytes_of_one) is null then
                    problem := format('its headers have more than %s bytes as text', max_bytes_of_one);
                else
                    envelope := convert_to(dovecote.envelope(event), 'UTF8');
                    if octet_length(envelope) > max_bytes_of_one then
                        problem := format('its envelope has %s bytes, at most %s are sent',
                                          octet_length(envelope), max_bytes_of_one);
                        envelope := null;
                    elsif envelope is null then
                        problem := 'it has a null where there must be none';
                    end if;
                end if;
            end if;
        exception
            when others then
                envelope := null;
                problem := format('Postgres cannot make its envelope: %s (SQLSTATE %s)', sqlerrm, sqlstate);
        end;
        return next;
        made := made + coalesce(octet_length(envelope), 0);
        failed := failed + (problem is not null)::integer;
        exit when made >= max_bytes or failed = 20;
    end loop;
end $$;

comment on function dovecote.envelopes is
    'For the relay: envelopes of rows that are large or compressed, each by itself, within a number of bytes.';

create function dovecote.message_bytes(event uuid) returns bigint
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
-- About how many bytes of a message the event takes. One whose envelope cannot be made takes none: it is in no message.
begin
    return (select case when pg_column_compression(o.payload) is null and pg_column_size(o.payload) < 4000
                   then pg_column_size(o.payload) else coalesce(dovecote.json_text_bytes(o.payload, 1000000), 0) end + 500
            from dovecote.outbox o where o.id = event);
exception
    when others then
        return 0;
end $$;

-- Rights ---------------------------------------------------------------------------------------
-- The worker's update on a view is a right to lock it: there is nothing in it to update. A writer may invent types
-- without end: the relay keeps the unrouted ones that it met last, and deletes others.

grant select on dovecote.relay_state, dovecote.published_batches, dovecote.unrouted_types, dovecote.postponed
    to dovecote_operator, dovecote_viewer;
grant select, update on dovecote.relay_state to dovecote_worker;
grant select, insert on dovecote.published_batches to dovecote_worker;
grant select on dovecote.outbox_events to dovecote_worker, dovecote_operator, dovecote_viewer;
grant select, insert, update, delete on dovecote.unrouted_types, dovecote.postponed to dovecote_worker;
grant update on dovecote.relay_leader to dovecote_worker;
grant select on sequence dovecote.relay_heartbeat to dovecote_operator, dovecote_viewer;
grant select, update on sequence dovecote.relay_heartbeat to dovecote_worker;
grant execute on function dovecote.try_lock to dovecote_worker;
grant execute on function
    dovecote.leader, dovecote.low_watermark, dovecote.active_writers, dovecote.server_started, dovecote.server_run,
    dovecote.outbox_run, dovecote.not_in_outbox, dovecote.envelope, dovecote.small_envelope, dovecote.envelopes,
    dovecote.message_bytes
    to dovecote_worker, dovecote_operator, dovecote_viewer;
