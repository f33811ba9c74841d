-- Reading beside held writers and rolled-back ones at no cost: dovecote/store/reader.py, gaps.py and leading.py.

create function dovecote.writers_at_work(out floors bigint[], out xids bigint[])
language plpgsql volatile as $$
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
language plpgsql as $$
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
