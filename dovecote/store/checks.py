"""What doctor and metrics both ask Postgres about the health of the system, as SQL without parameters."""

#: The writer with the lowest low-water mark, for how long it has been open, and how many writers there are. As in
#: dovecote.low_watermark().
OLDEST_WRITER = """
    select count(*) over () as held, l.pid, a.usename::text as login,
           case when l.classid::bigint & 32768 = 0 then ((l.classid::bigint & 65535) << 32) | l.objid::bigint else 0 end
               as low_water_mark,
           coalesce(a.application_name, '') as application, coalesce(left(a.query, 200), '') as query,
           coalesce(extract(epoch from clock_timestamp() - coalesce(a.xact_start, p.prepared)), 0)::float8 as seconds,
           p.gid
    from pg_locks l
    left join pg_stat_activity a on a.pid = l.pid
    left join pg_prepared_xacts p on l.pid is null and exists (
        select from pg_locks t where t.locktype = 'transactionid' and t.transactionid = p.transaction
                                 and t.virtualtransaction = l.virtualtransaction)
    where l.locktype = 'advisory' and l.objsubid = 1 and l.classid::bigint >> 16 = 17602 and l.mode = 'ShareLock'
      and l.database = (select oid from pg_database where datname = current_database())
      and l.virtualtransaction in (
          select i.virtualtransaction from pg_locks i
          where i.locktype = 'relation' and i.relation = 'dovecote.outbox'::regclass and i.mode = 'RowExclusiveLock')
    order by low_water_mark, seconds desc limit 1
"""

#: How many of the next four weeks have partitions, how long those last, and which default partitions are in use.
PARTITIONS = """
    select (select count(*) from generate_series(1, 4) week
            where to_regclass('dovecote.outbox_' || to_char(
                date_trunc('week', now() at time zone 'UTC') + make_interval(weeks => week::integer),
                'IYYY"w"IW')) is not null) as ahead,
           (select greatest(0, extract(epoch from min(monday) - now() at time zone 'UTC'))::float8
            from generate_series(0, 60) week,
                 lateral (select date_trunc('week', now() at time zone 'UTC')
                                 + make_interval(weeks => week::integer) as monday) of_week
            where to_regclass('dovecote.outbox_' || to_char(monday, 'IYYY"w"IW')) is null) as headroom_seconds,
           (select string_agg(c.relname, ', ') from pg_class c
            where c.oid in (to_regclass('dovecote.outbox_default'), to_regclass('dovecote.processed_events_default'),
                            to_regclass('dovecote.published_batches_default'))
              and pg_relation_size(c.oid) > 0) as defaults
"""

#: Which part of the queue of notifications is in use, 0 to 1. Asking frees what everybody has read.
NOTIFY_QUEUE = "select pg_notification_queue_usage() as used"

#: Since when which handler has had a full queue.
POSTPONED = """
    select handler_name, extract(epoch from clock_timestamp() - since)::float8 as seconds
    from dovecote.postponed order by handler_name
"""
