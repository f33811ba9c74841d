-- Bodies as they were before; their search_path as 0027 has set it.

create or replace function dovecote.horizon(out last_position bigint, out settled bigint)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- `last_position`: the highest position handed out. `settled`: everything at or below it is committed
-- or gone for ever. The order is the proof: first the sequence, then what writers announce, and rows only after both.
declare
    lowest_floor bigint;
begin
    -- Not called since setval(..., false) or RESTART: the value is the next one.
    select case when is_called then last_value else last_value - 1 end into last_position from dovecote.outbox_position;
    select min(((classid::bigint & 65535) << 32) | objid::bigint) into lowest_floor
    from pg_locks
    where locktype = 'advisory' and objsubid = 1 and classid::bigint >> 16 = 17602
      and database = (select oid from pg_database where datname = current_database());
    settled := least(last_position, lowest_floor);
end $$;

create or replace function dovecote.writers_at_work(out floors bigint[], out xids bigint[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Each writer at work: its floor, and its transaction. One that holds its floor and no number of a transaction any more
-- is over: numbers are given back first.
-- Savepoints hold numbers too, all above that of their transaction: the lowest of a holder is the transaction's.
-- pg_locks shows the lower 32 of 64 bits. Shifted up and down they are the signed distance from the number of now.
declare
    now_xid constant bigint := pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint;
begin
    select coalesce(array_agg(holder.floor), '{}'), coalesce(array_agg(holder.xid), '{}') into floors, xids
    from (
        select min(((l.classid::bigint & 65535) << 32) | l.objid::bigint) filter (where l.locktype = 'advisory'),
               min(now_xid + (((l.transactionid::text::bigint - now_xid) << 32) >> 32))
        from pg_catalog.pg_locks l
        where l.locktype = 'advisory' and l.objsubid = 1 and l.classid::bigint >> 16 = 17602
              and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
           or l.locktype = 'transactionid' and l.mode = 'ExclusiveLock'
        group by l.virtualtransaction
    ) as holder (floor, xid)
    where holder.floor is not null and holder.xid is not null;
end $$;

create or replace function dovecote.announce() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- "Whatever I insert lies above this floor": taken before the first position of the transaction, held
-- until its end. Once a transaction is enough: its first floor is its lowest. A rollback to a savepoint
-- gives back lock and setting together.
declare
    announced text;
begin
    if pg_catalog.current_setting('dovecote.announced', true) is distinct from pg_catalog.pg_current_xact_id()::text then
        if not pg_catalog.pg_try_advisory_xact_lock_shared(dovecote.floor_key(
                coalesce(pg_catalog.pg_sequence_last_value('dovecote.outbox_position'), 0))) then
            raise exception 'somebody holds a floor of the outbox exclusively, which nobody may';
        end if;
        -- An assignment: perform would be a query.
        announced := pg_catalog.set_config('dovecote.announced', pg_catalog.pg_current_xact_id()::text, true);
        -- A relay that sleeps holds this key for itself, and is woken. The key is given back at once, in the same
        -- expression, where nothing can be interrupted: held to the end it would keep the relay from sleeping. The
        -- floor comes first: by it a relay that falls asleep now knows that we shall say nothing.
        if (case when pg_catalog.pg_try_advisory_lock_shared(dovecote.bell_key())
                 then not pg_catalog.pg_advisory_unlock_shared(dovecote.bell_key()) else true end) then
            -- As in dovecote.wake; a call of it would be a query.
            if pg_catalog.float8lt(pg_catalog.pg_notification_queue_usage(), 0.5) then
                perform pg_catalog.pg_notify('dovecote_outbox', '');
            end if;
        end if;
    end if;
    return null;
end $$;

do $$
declare
    change record;
    was    text;
begin
    for change in
        select * from (values
            ('hold_week', 'dovecote.try_lock(''retention_lock'')', 'pg_try_advisory_xact_lock(17606::bigint << 48)'),
            ('copy_strays', 'dovecote.try_lock(''retention_lock'')', 'pg_try_advisory_xact_lock(17606::bigint << 48)'),
            ('move_strays', 'dovecote.try_lock(''retention_lock'')', 'pg_try_advisory_xact_lock(17606::bigint << 48)'),
            ('move_marks', 'dovecote.try_lock(''progress_lock'')', 'pg_try_advisory_xact_lock(dovecote.progress_key())'),
            ('begin_progress', 'lock table dovecote.progress_lock in share update exclusive mode',
             'perform pg_advisory_xact_lock(dovecote.progress_key())'),
            ('widen_progress', 'lock table dovecote.progress_lock in share update exclusive mode',
             'perform pg_advisory_xact_lock(dovecote.progress_key())'),
            ('reopen_progress', 'lock table dovecote.progress_lock in share update exclusive mode',
             'perform pg_advisory_xact_lock(dovecote.progress_key())'),
            ('release_next', 'perform dovecote.share_release_lock(handler)',
             'perform pg_catalog.pg_advisory_xact_lock_shared(dovecote.release_key(handler))'),
            ('release_behind', 'perform dovecote.share_release_lock(h)',
             'perform pg_advisory_xact_lock_shared(dovecote.release_key(h))')
        ) as changes (name, new, old)
    loop
        select pg_catalog.pg_get_functiondef(p.oid) into strict was
        from pg_catalog.pg_proc p
        where p.proname = change.name and p.pronamespace = 'dovecote'::regnamespace;
        execute pg_catalog.replace(was, change.new, change.old);
    end loop;
end $$;

drop function dovecote.share_release_lock, dovecote.try_lock, dovecote.foreign_locks, dovecote.look_at_advisory_locks,
    dovecote.leader;
alter table dovecote.replays drop column problem;
drop view dovecote.retention_lock, dovecote.progress_lock, dovecote.relay_leader;
