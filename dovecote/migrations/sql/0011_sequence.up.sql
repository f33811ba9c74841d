-- Positions that are handed out in order, and the cure where they were not.
--
-- The relay reads forward. An event whose position it has read already, or that was handed out in a block to one
-- session, is never read: so the relay does not lead where that can happen (dovecote/store/sequence.py).

create function dovecote.sequence_state(
    out handed_out bigint, out highest_known bigint, out cache bigint, out increment bigint, out cycles boolean)
language sql stable
begin atomic
    -- What is above the sequence is asked for by index. A healthy system has no such row, however large it is:
    -- the snapshot is older than the read of the sequence, so every visible position was assigned before.
    select s.handed_out,
           greatest(
               s.handed_out,
               (select r.checkpoint from dovecote.relay_state r),
               (select max(f.since_position) from dovecote.subscriptions f),
               (select max(p.examined) from dovecote.progress p),
               (select max(w.last_position) from dovecote.dropped_partitions w),
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
                     r.refused_since) - interval '1 minute' as begin_at, r.checkpoint
        from dovecote.relay_state r
    )
    select o.id, o.event_type, o.position, o.created_at
    from dovecote.outbox o
    cross join lateral (select bool_or(b.published_at >= o.created_at) as was_read from dovecote.published_batches b
                        where b.positions @> o.position) batch
    -- The time in an id is that of its row, or somewhat older: an hour covers what is made by the default.
    where o.id >= (select dovecote.uuid_v7_lower_bound(greatest(begin_at, timestamptz '1971-01-01') - interval '1 hour') from since)
      and o.created_at >= (select begin_at from since)
      and coalesce(not batch.was_read, o.position <= (select checkpoint from since))
      -- A clock that was set back makes an event look younger than its batch: what was processed or failed was read.
      and not exists (select from dovecote.processed_events p where p.event_id = o.id)
      and not exists (select from dovecote.deliveries d where d.event_id = o.id);
end;

comment on function dovecote.never_read is
    'Events that the relay does not find any more: they were written at positions that it had passed.';

create function dovecote.recover_sequence(
    out handed_out_before bigint, out handed_out bigint, out highest_known bigint, out renumbered bigint
) returns record
language plpgsql volatile security definer
set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
-- Let positions be handed out in order, above all that are known, and give new ones to the events that were never read:
-- the relay then reads them as what they are, new. Old positions would hide them from handlers that subscribed later.
begin
    -- On a system that is well nothing is locked: the lock would stay until the caller's transaction ends.
    if dovecote.sequence_fault() is null and not exists (select from dovecote.never_read())
       and not exists (select from dovecote.relay_state s where s.refused_since is not null) then
        select s.handed_out, s.handed_out, s.highest_known, 0 into handed_out_before, handed_out, highest_known, renumbered
        from dovecote.sequence_state() s;
        return;
    end if;
    -- The lock waits for each transaction that has a position, and keeps new ones waiting until this one is over.
    -- Whatever a session has in its cache is discarded with the change.
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

create function dovecote.recover(
    actor text, reason text, out renumbered bigint, out handed_out bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
-- dovecote.recover_sequence() with its audit line; null where there is nothing to recover: writers wait for nothing.
declare
    fault  constant text := dovecote.sequence_fault();
    unread constant bigint := (select count(*) from (select from dovecote.never_read() limit 100000) as some_of_them);
    done   record;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'what others commit meanwhile has to be seen: use a transaction of isolation level READ COMMITTED'
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    if fault is null and unread = 0 and (select r.refused_since is null from dovecote.relay_state r) then
        return;
    end if;
    select * into done from dovecote.recover_sequence();
    renumbered := done.renumbered;
    handed_out := done.handed_out;
    perform dovecote.write_audit_line(
        actor, 'sequence.recover', reason, renumbered,
        jsonb_build_object('fault', fault, 'handed_out', done.handed_out_before, 'continues_after', done.highest_known,
                           'unread', greatest(unread, renumbered), 'handed_out_now', handed_out));
end $$;

-- Rights ---------------------------------------------------------------------------------------

grant execute on function dovecote.sequence_state, dovecote.sequence_fault, dovecote.never_read
    to dovecote_worker, dovecote_operator, dovecote_viewer;
grant execute on function dovecote.recover_sequence to dovecote_worker;
grant execute on function dovecote.recover to dovecote_worker, dovecote_operator;
