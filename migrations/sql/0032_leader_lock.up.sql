-- Locks that need a privilege (docs/adr/0036).
--
-- Anybody who may connect takes any advisory lock. A table lock is for those with a right on the table. Each lock here
-- is on a view of its own, taken in SHARE UPDATE EXCLUSIVE mode:
--
--   a view    has no rows, so no vacuum ever waits for a lock that is held for months, and none freezes its numbers
--   the mode  conflicts with itself, and not with what PREPARE takes without any right: ACCESS SHARE, ROW SHARE, ROW
--             EXCLUSIVE
--
-- A transaction that holds nothing else has neither a number nor a snapshot: it does not hold back vacuum.

create view dovecote.relay_leader as select 'held by the relay that leads' as purpose;
create view dovecote.progress_lock as select 'held while low-water marks are moved or opened' as purpose;
create view dovecote.retention_lock as select 'held while weeks are kept in order' as purpose;

comment on view dovecote.relay_leader is 'The relay that leads holds a lock on it: `select * from dovecote.leader()`.';

-- To lock. There is nothing in them to update.
grant update on dovecote.relay_leader, dovecote.progress_lock to dovecote_worker;

-- Who leads -------------------------------------------------------------------------------------

-- The session that holds the lock of the relay that leads; no row while none does. `silent_seconds` since it has asked
-- something, null for a login that may not see that. A relay from before this revision holds the advisory key instead:
-- it counts if its login may lead, and comes after one that has the lock.
create function dovecote.leader()
returns table (pid integer, login text, application text, silent_seconds float8, is_older boolean)
language sql stable
begin atomic
    select l.pid, a.usename::text, a.application_name, extract(epoch from clock_timestamp() - a.query_start)::float8,
           l.locktype = 'advisory'
    from pg_catalog.pg_locks l left join pg_catalog.pg_stat_activity a on a.pid = l.pid
    where l.granted and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
      and (l.locktype = 'relation' and l.relation = 'dovecote.relay_leader'::regclass
           and l.mode = 'ShareUpdateExclusiveLock'
        or l.locktype = 'advisory' and l.objsubid = 1 and l.mode = 'ExclusiveLock'
           and (l.classid::bigint << 32 | l.objid::bigint) = dovecote.leader_key()
           and pg_has_role(a.usesysid, 'dovecote_worker', 'member'))
    order by 5;
end;

-- Announcements ---------------------------------------------------------------------------------

-- A shared lock announces a position if its transaction also has the lock on dovecote.outbox that every INSERT takes
-- before its triggers are called, and keeps. Nobody has that one without a right on the outbox or the schema.
--
-- pg_locks looks at relations first: of a transaction whose lock on the outbox it has not seen, the positions are above
-- the sequence as it was read before. PREPARE TRANSACTION hands the locks over one by one, and each keeps the number of
-- the virtual transaction.
--
-- From 2^47 on, above all positions there can be, it announces that a writer is at work and not where.

create or replace function dovecote.horizon(out last_position bigint, out settled bigint)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- `last_position`: the highest position handed out. `settled`: everything at or below it is committed
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
    settled := least(last_position, lowest);
end $$;

create or replace function dovecote.writers_at_work(out floors bigint[], out xids bigint[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Each writer at work: the position it has announced, and its transaction. One that holds its announcement and no number
-- of a transaction any more is over: numbers are given back first.
-- Savepoints hold numbers too, all above that of their transaction: the lowest of a holder is the transaction's.
-- pg_locks shows the lower 32 of 64 bits. Shifted up and down they are the signed distance from the number of now.
declare
    now_xid constant bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
begin
    select coalesce(array_agg(h.announced), '{}'), coalesce(array_agg(h.xid), '{}') into floors, xids
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

create or replace function dovecote.announce() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- "Whatever I insert lies above this position": taken before the first position of the transaction, held until its end.
-- Once a transaction is enough: its first announcement is its lowest. A rollback to a savepoint gives back lock and
-- setting together. Anybody may write the setting: it says which lock to take once more, which costs nothing where it
-- is held. An announcement at a lower position is as good.
declare
    told constant text := current_setting('dovecote.announced', true);
    announced     bigint;
    last_position bigint;
begin
    if told <> '' then
        announced := told;
        if pg_current_xact_id() is not null
           and (announced between 0 and pg_sequence_last_value('dovecote.outbox_position')
                or announced between 1::bigint << 47 and (1::bigint << 48) - 1)
           and pg_try_advisory_xact_lock_shared(dovecote.floor_key(announced)) then
            return null;
        end if;
    end if;
    -- The number of the transaction first: dovecote.writers_at_work() takes an announcement without one for over.
    last_position := case when pg_current_xact_id() is not null
                     then coalesce(pg_sequence_last_value('dovecote.outbox_position'), 0) end;
    announced := last_position;
    if not pg_try_advisory_xact_lock_shared(dovecote.floor_key(announced)) then
        -- A stranger has it. A session cannot hold so many locks that it has most of those below, and none can have
        -- most of those that say no more than that somebody writes.
        for try in 1 .. 10 loop
            announced := case when try <= 2 then last_position - floor(random() * least(last_position, 100000))::bigint
                         else (1::bigint << 47) + floor(random() * (1::bigint << 47))::bigint end;
            exit when pg_try_advisory_xact_lock_shared(dovecote.floor_key(announced));
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
    if (case when pg_try_advisory_lock_shared(dovecote.bell_key())
             then not pg_advisory_unlock_shared(dovecote.bell_key()) else true end) then
        -- As in dovecote.wake; a call of it would be a query.
        if float8lt(pg_notification_queue_usage(), 0.5) then
            perform pg_notify('dovecote_outbox', '');
        end if;
    end if;
    return null;
end $$;

-- What strangers hold ---------------------------------------------------------------------------

create function dovecote.look_at_advisory_locks()
returns table (lock text, kind bigint, mode text, pid integer, login text, application text, prepared text)
language sql volatile
begin atomic
    -- The locks with keys of ours whose holder has no use for them, if this look at them all was taken at one moment.
    with held as materialized (
        select l.virtualtransaction as holder, l.pid, l.locktype, l.classid::bigint >> 16 as kind, l.mode, l.transactionid,
               concat_ws(' ', l.classid, l.objid, l.mode, coalesce(l.pid::text, l.virtualtransaction)) as lock
        from pg_catalog.pg_locks l
        where l.granted
          and (l.locktype = 'transactionid' and l.pid is null
            or l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
               and (l.locktype = 'advisory' and l.objsubid = 1 and l.classid::bigint >> 16 in (17602, 17603, 17604, 17607)
                 or l.locktype = 'relation' and l.relation = 'dovecote.outbox'::regclass and l.mode = 'RowExclusiveLock'))
    ), holders as materialized (
        select h.holder, h.pid, coalesce(a.usename::text, max(p.owner::text)) as login, a.application_name as application,
               max(p.gid) as prepared, bool_or(h.locktype = 'relation') as inserts
        from held h
        left join pg_catalog.pg_stat_activity a on a.pid = h.pid
        left join pg_catalog.pg_prepared_xacts p on p.transaction = h.transactionid
        group by h.holder, h.pid, a.usename, a.application_name
    ), judged as materialized (
        select o.*, coalesce(pg_has_role(o.login::name, 'dovecote_worker', 'member'), false) as is_worker,
               coalesce(pg_has_role(o.login::name, 'dovecote_operator', 'member'), false) as is_operator
        from holders o
    )
    select h.lock, h.kind, h.mode, h.pid, j.login::text, j.application, j.prepared
    from held h join judged j on j.holder = h.holder and j.pid is not distinct from h.pid
    where h.locktype = 'advisory'
      and case h.kind
              when 17602 then h.mode <> 'ShareLock' or not j.inserts
              when 17603 then case when h.mode = 'ShareLock' then not j.inserts else not j.is_worker end
              when 17604 then h.mode = 'ShareLock' or not j.is_worker
              else not (j.is_worker or j.is_operator) end;
end;

create function dovecote.foreign_locks()
returns table (purpose text, locks bigint, pid integer, login text, application text, prepared text, mode text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Who holds advisory locks with keys of ours and has no use for them: a row for each session, purpose and mode.
--
--     announcement  a shared one is not heeded; beside an exclusive one writers announce a lower position
--     wake-up       the relay cannot sleep, and polls as often as its settings let it; or each writer sends a NOTIFY
--     leadership    a relay leads all the same, but relays from before revision 0032 do not
--     release       a consumer goes on without the lock, and the relay releases what it has left
--
-- Two looks: a writer that has just begun may be seen with the second of its locks and without the first.
declare
    seen text[];
begin
    select array_agg(l.lock) into seen from dovecote.look_at_advisory_locks() l;
    if seen is null then
        return;
    end if;
    perform pg_sleep(0.02);
    return query
        select case l.kind when 17602 then 'announcement' when 17603 then 'wake-up' when 17604 then 'leadership'
                           else 'release' end,
               count(*), l.pid, l.login, l.application, l.prepared, l.mode
        from dovecote.look_at_advisory_locks() l join unnest(seen) as s (lock) on s.lock = l.lock
        group by 1, 3, 4, 5, 6, 7
        order by 1, 3;
end $$;

-- Turns -----------------------------------------------------------------------------------------

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

create function dovecote.share_release_lock(handler text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Take the lock that whoever parks events of the handler takes alone. Wait for a second at most, and not for a stranger:
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

grant execute on function dovecote.leader, dovecote.look_at_advisory_locks, dovecote.foreign_locks
    to dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.try_lock to dovecote_worker;
grant execute on function dovecote.share_release_lock to dovecote_worker, dovecote_operator;

-- The bodies of functions from before, with these locks instead of advisory ones. By their text: what else later
-- revisions have made of them stays.
do $$
declare
    change  record;
    was     text;
    becomes text;
begin
    for change in
        select * from (values
            ('hold_week', '(pg_catalog\.)?pg_try_advisory_xact_lock\(17606::bigint << 48\)',
             'dovecote.try_lock(''retention_lock'')'),
            ('copy_strays', '(pg_catalog\.)?pg_try_advisory_xact_lock\(17606::bigint << 48\)',
             'dovecote.try_lock(''retention_lock'')'),
            ('move_strays', '(pg_catalog\.)?pg_try_advisory_xact_lock\(17606::bigint << 48\)',
             'dovecote.try_lock(''retention_lock'')'),
            ('move_marks', '(pg_catalog\.)?pg_try_advisory_xact_lock\(dovecote\.progress_key\(\)\)',
             'dovecote.try_lock(''progress_lock'')'),
            ('begin_progress', 'perform (pg_catalog\.)?pg_advisory_xact_lock\(dovecote\.progress_key\(\)\)',
             'lock table dovecote.progress_lock in share update exclusive mode'),
            ('widen_progress', 'perform (pg_catalog\.)?pg_advisory_xact_lock\(dovecote\.progress_key\(\)\)',
             'lock table dovecote.progress_lock in share update exclusive mode'),
            ('reopen_progress', 'perform (pg_catalog\.)?pg_advisory_xact_lock\(dovecote\.progress_key\(\)\)',
             'lock table dovecote.progress_lock in share update exclusive mode'),
            ('release_next', 'perform (pg_catalog\.)?pg_advisory_xact_lock_shared\(dovecote\.release_key\(handler\)\)',
             'perform dovecote.share_release_lock(handler)'),
            ('release_behind', 'perform (pg_catalog\.)?pg_advisory_xact_lock_shared\(dovecote\.release_key\(h\)\)',
             'perform dovecote.share_release_lock(h)')
        ) as changes (name, old, new)
    loop
        select pg_catalog.pg_get_functiondef(p.oid) into strict was
        from pg_catalog.pg_proc p
        where p.proname = change.name and p.pronamespace = 'dovecote'::regnamespace;
        becomes := pg_catalog.regexp_replace(was, change.old, change.new);
        if becomes = was then
            raise exception 'dovecote.% is not as revision 0032 expects it', change.name;
        end if;
        execute becomes;
    end loop;
end $$;

-- Rows that are not understood -------------------------------------------------------------------

alter table dovecote.replays add column problem text;
grant update (problem) on dovecote.replays to dovecote_worker;

comment on column dovecote.replays.problem is
    'Why the relay that leads does not carry the replay out; null where it does. Another version may.';
