-- A wake-up never fails the transaction that it follows.
--
-- Postgres has one queue of notifications for the whole cluster. It is as long as its slowest listener makes it: one that
-- stays in a transaction keeps all of it, and when it is full every NOTIFY fails, at COMMIT. What nobody was woken for
-- is found by polling, so from half of the queue on nobody is woken. The other half is room for those who have
-- asked and not committed yet: with Postgres's own size, 8 GB, for some 100 million of them.

create function dovecote.wake(channel text) returns void
language plpgsql volatile as $$
-- Notify, unless that might fail. Asking how full the queue is also frees what everybody has read: Postgres does it
-- in a NOTIFY that commits, and while none can, nobody does.
begin
    if pg_catalog.float8lt(pg_catalog.pg_notification_queue_usage(), 0.5) then
        perform pg_catalog.pg_notify(channel, '');
    end if;
end $$;

comment on function dovecote.wake is 'Notify a channel of ours, unless the queue of notifications is half full.';

grant execute on function dovecote.wake to dovecote_writer, dovecote_worker, dovecote_operator;

-- The writers' own wake-up, dovecote.announce(), is made anew in 0019.
