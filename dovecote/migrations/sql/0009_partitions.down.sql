drop trigger skip_dropped_partition on dovecote.processed_events_default;
drop trigger refuse_dropped_partition on dovecote.outbox_default;
drop function dovecote.place_misplaced_rows, dovecote.move_misplaced_rows, dovecote.copy_misplaced_rows, dovecote.make_staging_table,
              dovecote.misplaced_weeks, dovecote.partition_key, dovecote.skip_dropped_partition, dovecote.refuse_dropped_partition,
              dovecote.ensure_partitions, dovecote.make_partitions, dovecote.week_monday, dovecote.week_suffix;
drop table dovecote.dropped_partitions;
drop view dovecote.retention_lock;

-- The weekly partitions are dropped with their rows, like every table of a downgraded revision.
do $$
declare
    part regclass;
begin
    for part in
        select i.inhrelid from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
        where i.inhparent in ('dovecote.outbox'::regclass, 'dovecote.processed_events'::regclass,
                              'dovecote.published_batches'::regclass)
              and c.relname !~ '_default$'
    loop
        execute format('drop table %s', part);
    end loop;
end $$;
