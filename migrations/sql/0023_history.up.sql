-- Which run of Postgres this is, and the history in which Redis was told what it holds.

create function dovecote.server_started() returns bigint
language sql stable parallel safe
begin atomic
    -- Unix microseconds. All processes begin anew when one was killed, though the postmaster stays: so do its statistics.
    select (extract(epoch from greatest(pg_catalog.pg_postmaster_start_time(),
                                        pg_catalog.pg_stat_get_bgwriter_stat_reset_time())) * 1000000)::bigint;
end;

comment on function dovecote.server_started is
    'When this run of Postgres began. What a session has seen committed is forgotten only with the run: by a crash, a '
    'restore, a failover.';

create function dovecote.server_run() returns text
language sql stable
begin atomic
    -- pg_control_checkpoint() shows the timeline of before for a while after a promotion; pg_walfile_name() does not.
    select pg_catalog.concat_ws(' ', (select system_identifier from pg_catalog.pg_control_system()),
        ('x' || substring(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) from 1 for 8))::bit(32)::bigint,
        dovecote.server_started());
end;

comment on function dovecote.server_run is 'Which run of which Postgres this is: system identifier, timeline, start.';
