drop trigger skip_dropped_week on dovecote.processed_events_default;
drop trigger refuse_dropped_week on dovecote.outbox_default;
drop function dovecote.place_strays, dovecote.move_strays, dovecote.copy_strays, dovecote.make_aside,
              dovecote.stray_weeks, dovecote.stray_key, dovecote.skip_dropped_week, dovecote.refuse_dropped_week,
              dovecote.ensure_partitions, dovecote.make_partitions, dovecote.week_monday, dovecote.week_suffix;
drop table dovecote.dropped_weeks;
drop view dovecote.retention_lock;

-- The weeks go with their rows, as every table does whose revision is taken back.
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
