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
    'one may have forgotten what this one told.';

alter table dovecote.relay_state
    add column history text,
    add column instance text,
    add column stands_back_for text;

comment on column dovecote.relay_state.history is
    'Redis holds what was published in this history, and names it. Another begins when either may have forgotten.';
comment on column dovecote.relay_state.instance is 'server_run() in which the history began or was last found as known.';
comment on column dovecote.relay_state.stands_back_for is
    'server_run() of the newer Postgres whose relay uses our Redis; ours does not publish meanwhile.';

-- How far Postgres is, told to Redis once it is on disk. A sequence keeps no old versions, and setval() logs each value
-- where nextval() would log 32 ahead.
create sequence dovecote.relay_beat as bigint minvalue 0 start 0 cache 1;

comment on sequence dovecote.relay_beat is
    'Moves at most once a second while messages are under way: first here, then in Redis. Should either go back without '
    'another run, the two differ.';

grant select, update on sequence dovecote.relay_beat to dovecote_worker;
grant select on sequence dovecote.relay_beat to dovecote_operator;
