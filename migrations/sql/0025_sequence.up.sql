-- Positions that are handed out in order, and the cure where they were not.
--
-- The relay reads forward. An event whose position it has read already, or that was handed out in a block to one
-- session, is never read: so the relay does not lead where that can happen (dovecote/store/sequence.py).

alter table dovecote.relay_state add column refused_since timestamptz;

comment on column dovecote.relay_state.refused_since is
    'Since when relays have refused to lead because of the sequence; null once dovecote.recover_sequence() was called.';

create or replace function dovecote.horizon(out last_position bigint, out settled bigint)
language plpgsql volatile as $$
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

create function dovecote.sequence_state(
    out handed_out bigint, out highest_known bigint, out cache bigint, out increment bigint, out cycles boolean)
language sql stable
begin atomic
    -- What is above the sequence is asked for by index. There is nothing in a system that is well, however large it is:
    -- the snapshot is older than the look at the sequence, so all that it shows was handed out before.
    select s.handed_out,
           greatest(
               s.handed_out,
               (select r.checkpoint from dovecote.relay_state r),
               (select max(f.since_position) from dovecote.subscriptions f),
               (select max(p.examined) from dovecote.progress p),
               (select max(w.last_position) from dovecote.dropped_weeks w),
               (select o.position from dovecote.outbox o where o.position > s.handed_out order by o.position desc limit 1),
               (select max(upper(b.positions)) - 1 from dovecote.published_batches b
                where b.positions && int8multirange(int8range(s.handed_out, null, '()')))),
           d.seqcache, d.seqincrement, d.seqcycle
    from (select case when q.is_called then q.last_value else q.last_value - 1 end as handed_out
          from dovecote.outbox_position q) s
    cross join pg_catalog.pg_sequence d
    where d.seqrelid = 'dovecote.outbox_position'::regclass;
end;

comment on function dovecote.sequence_state is
    'What the sequence of positions has handed out, the highest position that is known to be in use, and how it counts.';

create function dovecote.sequence_fault() returns text
language sql stable
begin atomic
    select case
        when s.highest_known > s.handed_out then
            pg_catalog.format('the sequence dovecote.outbox_position is behind: it has handed out %s, and position %s is '
                   'in use; what is written now is not read; run `dovecote recover`', s.handed_out, s.highest_known)
        when s.cache <> 1 or s.increment <> 1 or s.cycles then
            pg_catalog.format('the sequence dovecote.outbox_position has cache %s, increment %s%s, and must have cache 1, '
                   'increment 1, no cycle; what is written now may not be read; run `dovecote recover`',
                   s.cache, s.increment, case when s.cycles then ', cycle' else '' end)
    end
    from dovecote.sequence_state() s;
end;

comment on function dovecote.sequence_fault is
    'What is wrong with the sequence of positions, in one sentence that ends with the cure; null where nothing is.';

create function dovecote.never_read()
returns table (event_id uuid, event_type text, was_position bigint, created_at timestamptz)
language sql stable
begin atomic
    -- Committed at a position that the relay had passed already. The relay's batch was recorded before the event was
    -- written, or there is none. Looked at is what was written since the relay published last, and a minute before.
    with since as materialized (
        select least(coalesce((select max(b.published_at) from dovecote.published_batches b), 'epoch'),
                     (select o.created_at from dovecote.outbox o order by o.position desc limit 1),
                     r.refused_since) - interval '1 minute' as moment, r.checkpoint
        from dovecote.relay_state r
    )
    select o.id, o.event_type, o.position, o.created_at
    from dovecote.outbox o
    cross join lateral (select bool_or(b.published_at >= o.created_at) as was_read from dovecote.published_batches b
                        where b.positions @> o.position) batch
    -- The time in an id is that of its row, or somewhat older: an hour covers what is made by the default.
    where o.id >= (select dovecote.uuid_v7_floor(greatest(moment, timestamptz '1971-01-01') - interval '1 hour') from since)
      and o.created_at >= (select moment from since)
      and coalesce(not batch.was_read, o.position <= (select checkpoint from since))
      -- A clock that was set back makes an event look younger than its batch: what was acted on or failed was read.
      and not exists (select from dovecote.processed_events p where p.event_id = o.id)
      and not exists (select from dovecote.deliveries d where d.event_id = o.id);
end;

comment on function dovecote.never_read is
    'Events that the relay does not find any more: they were written at positions that it had passed.';

create function dovecote.recover_sequence(
    out handed_out_before bigint, out handed_out bigint, out highest_known bigint, out renumbered bigint)
language plpgsql security definer set search_path = pg_catalog, dovecote, pg_temp set lock_timeout = '10s' as $$
-- Let positions be handed out in order, above all that are known, and give new ones to the events that were never read:
-- the relay then reads them as what they are, new. Old positions would hide them from handlers that subscribed later.
begin
    -- The lock waits for each transaction that has a position, and keeps new ones waiting until this one is over.
    -- Whatever a session has in its cache is forgotten with the change.
    alter sequence dovecote.outbox_position cache 1;
    select s.handed_out, s.highest_known into handed_out_before, highest_known from dovecote.sequence_state() s;
    if highest_known >= 1::bigint << 47 then
        raise exception 'position % was given by hand, and is above what positions may be (2^47)', highest_known
            using hint = 'Give its row a position of the sequence, as the owner of the schema, and call this again.';
    end if;
    execute format('alter sequence dovecote.outbox_position as bigint increment 1 minvalue 1 no maxvalue start 1 '
                   'restart %s cache 1 no cycle', highest_known + 1);
    -- As if it had been called, or the next writer would announce 0 (dovecote.announce).
    perform setval('dovecote.outbox_position', greatest(highest_known, 1), highest_known > 0);
    with found as materialized (
        select event_id, nextval('dovecote.outbox_position') as position
        from (select event_id from dovecote.never_read() order by created_at, was_position) in_order
    )
    update dovecote.outbox o set position = found.position from found where o.id = found.event_id;
    get diagnostics renumbered = row_count;
    handed_out := highest_known + renumbered;
    -- The relay that leads has read past them: its epoch is over. The next one asks what else is missing, from the beginning.
    update dovecote.relay_state set epoch = epoch + 1, redis_run_id = null, refused_since = null;
    perform dovecote.reopen_progress();
end $$;

comment on function dovecote.recover_sequence is
    'Repair the sequence of positions, whatever is wrong with it, and have the relay send what it did not see.';

revoke all on function dovecote.recover_sequence from public;
grant execute on function dovecote.recover_sequence to dovecote_worker, dovecote_operator;
