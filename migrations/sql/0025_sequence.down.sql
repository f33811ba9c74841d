drop function dovecote.recover_sequence, dovecote.never_read, dovecote.sequence_fault, dovecote.sequence_state;

create or replace function dovecote.horizon(out last_position bigint, out settled bigint)
language plpgsql volatile as $$
-- `last_position`: the highest position handed out. `settled`: everything at or below it is committed
-- or gone for ever. The order is the proof: first the sequence, then what writers announce, and rows only after both.
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

alter table dovecote.relay_state drop column refused_since;
