-- What strangers hold: locks of ours that keep writers, the relay or a release waiting.

create function dovecote.look_at_advisory_locks()
returns table (lock text, kind bigint, mode text, pid integer, login text, application text, prepared text)
language sql volatile
begin atomic
    -- The locks with keys of ours whose holder does not use the engine, as far as one read of pg_locks can show. And
    -- exclusive locks on our tables of logins without the privilege for LOCK TABLE (kind 0): CREATE TRIGGER, CREATE RULE
    -- and REFERENCES wait for theirs before Postgres checks the privilege, and later sessions wait behind.
    with held as materialized (
        select l.virtualtransaction as holder, l.pid, l.locktype, l.mode, l.transactionid, l.relation,
               case when l.locktype = 'relation' then 0 else l.classid::bigint >> 16 end as kind,
               concat_ws(' ', l.relation, l.classid, l.objid, l.mode, coalesce(l.pid::text, l.virtualtransaction)) as lock
        from pg_catalog.pg_locks l
        where l.locktype = 'relation'
              and l.mode in ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
              and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
              and l.relation in (select c.oid from pg_catalog.pg_class c where c.relnamespace = 'dovecote'::regnamespace)
           or l.granted
          and (l.locktype = 'transactionid' and l.pid is null
            or l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
               and (l.locktype = 'advisory' and l.objsubid = 1 and l.classid::bigint >> 16 in (17602, 17603, 17607)
                 or l.locktype = 'relation' and l.relation = 'dovecote.outbox'::regclass and l.mode = 'RowExclusiveLock'))
    ), holders as materialized (
        select h.holder, h.pid, coalesce(a.usename::text, max(p.owner::text)) as login, a.application_name as application,
               max(p.gid) as prepared,
               bool_or(h.locktype = 'relation' and h.mode = 'RowExclusiveLock') as inserts
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
    where (h.locktype = 'advisory' or h.locktype = 'relation' and h.mode <> 'RowExclusiveLock')
      and case h.kind
              -- Verbs lock as the owner, in sessions of operators and workers. Autovacuum has no login.
              when 0 then j.login is not null and not j.is_worker and not j.is_operator
                          and not has_table_privilege(j.login::name, h.relation, 'UPDATE, DELETE, TRUNCATE')
              when 17602 then h.mode <> 'ShareLock' or not j.inserts
              when 17603 then case when h.mode = 'ShareLock' then not j.inserts else not j.is_worker end
              else not (j.is_worker or j.is_operator) end;
end;

create function dovecote.foreign_locks()
returns table (purpose text, locks bigint, pid integer, login text, application text, prepared text, mode text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
-- Sessions that hold, or wait for, locks of ours without using the engine: a row for each session, purpose and mode.
--
--     announcement  a shared one is ignored; beside an exclusive one writers announce a lower position
--     wake-up       the relay cannot sleep, and polls as often as its settings let it; or each writer sends a NOTIFY
--     release       a consumer continues without the lock, and the relay releases the rest
--     table         writers wait until the session ends, also behind a session that waits itself
--
-- Two reads: a writer that has just begun may be listed with the second of its locks and without the first.
declare
    seen text[];
begin
    select array_agg(l.lock) into seen from dovecote.look_at_advisory_locks() l;
    if seen is null then
        return;
    end if;
    perform pg_sleep(0.02);
    return query
        select case l.kind when 0 then 'table' when 17602 then 'announcement' when 17603 then 'wake-up' else 'release' end,
               count(*), l.pid, l.login, l.application, l.prepared, l.mode
        from dovecote.look_at_advisory_locks() l join unnest(seen) as s (lock) on s.lock = l.lock
        group by 1, 3, 4, 5, 6, 7
        order by 1, 3;
end $$;

-- Rights ---------------------------------------------------------------------------------------

grant execute on function dovecote.look_at_advisory_locks, dovecote.foreign_locks
    to dovecote_worker, dovecote_operator, dovecote_viewer;
