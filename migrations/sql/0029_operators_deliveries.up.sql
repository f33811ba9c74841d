-- What operators do about failures: send again at once, or give up. Waiting events follow the one they wait for.

create function dovecote.in_outbox(event uuid) returns boolean
language sql stable parallel safe
begin atomic
    select exists (select from dovecote.outbox o where o.id = event);
end;

create function dovecote.changeable_states(verb text, filter jsonb) returns text[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
-- The states of the deliveries that the verb is about. Errors: a filter that makes no sense, or that it may not have.
declare
    possible text[];
begin
    perform dovecote.require_keys(filter, '{"handler": "string", "state": "string", "fingerprint": "string",
        "event_type": "string", "aggregate_type": "string", "aggregate_id": "string", "since": "moment",
        "event_id": "uuid", "without_route": "boolean"}');
    if filter ? 'event_id' and not filter ? 'handler' then
        raise exception 'a single delivery is named by its handler and its event' using errcode = 'invalid_parameter_value';
    end if;
    if verb is null or verb not in ('retry', 'discard') then
        raise exception 'deliveries are retried or discarded' using errcode = 'invalid_parameter_value';
    end if;
    possible := '{dead,retrying}';
    if verb = 'discard' and coalesce((filter ->> 'without_route')::boolean, false) then
        -- Nobody acts on what comes after, so its order is nobody's business any more.
        if not filter ? 'handler' or dovecote.is_routed(filter ->> 'handler') then
            raise exception '% has a route in the relay that leads: only what it has tried can be discarded',
                            coalesce(filter ->> 'handler', 'some handler')
                using errcode = 'object_not_in_prerequisite_state';
        end if;
        possible := '{dead,retrying,waiting}';
    end if;
    if filter ? 'event_id' then
        return possible;
    end if;
    if not filter ? 'state' then
        return '{dead}';
    end if;
    if filter ->> 'state' <> all(possible) then
        raise exception 'there is no % of % deliveries, only of % ones', verb, left(filter ->> 'state', 80),
                        array_to_string(possible, ' or ')
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    return array[filter ->> 'state'];
end $$;

create function dovecote.is_changeable(d dovecote.deliveries, verb text, filter jsonb, states text[]) returns boolean
language sql stable parallel safe
-- One expression, and the planner puts it where it is called: the indexes are used, what is not asked costs nothing.
return d.state = any(states)
    and (filter ->> 'handler' is null or d.handler_name = filter ->> 'handler')
    and (filter ->> 'fingerprint' is null or d.error_fingerprint = filter ->> 'fingerprint')
    and (filter ->> 'event_type' is null or d.event_type = filter ->> 'event_type')
    and (filter ->> 'aggregate_type' is null or d.aggregate_type = filter ->> 'aggregate_type')
    and (filter ->> 'aggregate_id' is null or d.aggregate_id = filter ->> 'aggregate_id')
    and (filter ->> 'event_id' is null or d.event_id = (filter ->> 'event_id')::uuid)
    and (filter ->> 'since' is null or d.updated_at >= (filter ->> 'since')::timestamptz)
    and case
        -- Nobody can act on an event that the outbox does not have; that one is gone, the relay has found out.
        when verb = 'retry' then d.error_type is distinct from 'EventIsGone' or dovecote.in_outbox(d.event_id)
        -- An event that was never tried may have an unfinished one before it. Discarding it would let those behind it
        -- pass that one: what comes after asks only for the one before (docs/adr/0009-one-predecessor.md).
        else d.state = 'dead' or (d.state = 'retrying' and d.error is not null)
            or coalesce((filter ->> 'without_route')::boolean, false)
        end;

create function dovecote.count_changeable(
    verb text, filter jsonb, out asked_at timestamptz, out states text[], out matching bigint)
language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan as $$
-- How many deliveries the verb would change. Nothing is changed.
begin
    states := dovecote.changeable_states(verb, filter);
    asked_at := clock_timestamp();
    select count(*) into matching from dovecote.deliveries d where dovecote.is_changeable(d, verb, filter, states);
end $$;

create function dovecote.change_deliveries(
    verb text, actor text, reason text, filter jsonb, changed_before timestamptz, most integer,
    out affected bigint, out released bigint)
language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan as $$
-- One batch: at most `most` deliveries last changed before that moment, with one line of the audit log. The rest is for
-- the next call: a transaction holds the locks of 5,000 rows for some 200 ms.
declare
    states   constant text[] := dovecote.changeable_states(verb, filter);
    handlers text[];
    events   uuid[];
begin
    if changed_before is null or most is null or most not between 1 and 5000 then
        raise exception 'a batch is of 1 to 5000 deliveries that were last changed before a moment'
            using errcode = 'invalid_parameter_value';
    end if;
    affected := 0;
    released := 0;
    -- One that is tried at this moment is locked by its worker. A group leaves it alone; a single one is waited for.
    if filter ? 'event_id' then
        select array_agg(c.handler_name), array_agg(c.event_id) into handlers, events
        from (select d.handler_name, d.event_id from dovecote.deliveries d
              where dovecote.is_changeable(d, verb, filter, states) and d.updated_at <= changed_before
              for update) as c;
    else
        select array_agg(c.handler_name), array_agg(c.event_id) into handlers, events
        from (select d.handler_name, d.event_id from dovecote.deliveries d
              where dovecote.is_changeable(d, verb, filter, states) and d.updated_at <= changed_before
              order by d.handler_name, d.event_id limit most for update skip locked) as c;
    end if;
    if events is null then
        return;
    end if;
    update dovecote.deliveries d
    set state = case verb when 'retry' then 'retrying' else 'discarded' end,
        attempts = case verb when 'retry' then 0 else d.attempts end,
        next_attempt_at = case verb when 'retry' then clock_timestamp() end, updated_at = clock_timestamp()
    from unnest(handlers, events) as c (handler_name, event_id)
    where d.handler_name = c.handler_name and d.event_id = c.event_id;
    get diagnostics affected = row_count;
    if verb = 'discard' then
        released := dovecote.release_behind(handlers, events);
    end if;
    perform dovecote.wake('dovecote_deliveries');
    perform dovecote.write_audit_line(
        actor, 'deliveries.' || verb, reason, affected,
        jsonb_build_object('filter', filter - 'state', 'states', states,
                           'handlers', (select jsonb_agg(distinct h order by h) from unnest(handlers) as h)));
end $$;

create function dovecote.release_behind(handlers text[], events uuid[]) returns bigint
language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan as $$
-- Send on the first event behind each of these, which were discarded; return how many waited behind them. The others go
-- with the first or after it. What was discarded had been tried: all before it is done.
declare
    waited bigint;
begin
    -- An event that is being parked behind one of these is looked at again by who parks it, after this has committed.
    perform pg_advisory_xact_lock_shared(dovecote.release_key(h)) from (select distinct unnest(handlers) as h order by 1) as d;
    with done as (
        select d.handler_name as handler, d.aggregate_type as type, d.aggregate_id as id, d.replay_id as replay,
               min(d.position) as position
        from unnest(handlers, events) as c (handler_name, event_id)
        join dovecote.deliveries d on d.handler_name = c.handler_name and d.event_id = c.event_id
        group by 1, 2, 3, 4
    ), behind as (
        select d.handler_name, d.event_id, d.position, first_value(d.event_id) over (
            partition by d.handler_name, d.aggregate_type, d.aggregate_id, d.replay_id order by d.position) as first
        from done join dovecote.deliveries d
          on d.state = 'waiting' and d.handler_name = done.handler and d.aggregate_type = done.type
             and d.aggregate_id = done.id and d.position > done.position
             and d.replay_id is not distinct from done.replay
    ), released as (
        update dovecote.deliveries d
        set state = 'retrying', next_attempt_at = clock_timestamp(), leased_until = null,
            updated_at = clock_timestamp()
        from behind where behind.event_id = behind.first
          and d.handler_name = behind.handler_name and d.event_id = behind.event_id and d.state = 'waiting'
    )
    select count(*) into waited from behind;
    return waited;
end $$;

create function dovecote.retry_deliveries(
    actor text, reason text, filter jsonb, changed_before timestamptz default clock_timestamp(), most integer default 5000,
    out affected bigint, out released bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    select * into affected, released
    from dovecote.change_deliveries('retry', actor, reason, filter, changed_before, most);
end $$;

create function dovecote.discard_deliveries(
    actor text, reason text, filter jsonb, changed_before timestamptz default clock_timestamp(), most integer default 5000,
    out affected bigint, out released bigint)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform dovecote.require_who_and_why(actor, reason, 'a discard needs a reason: what is given up is not done by anybody later');
    select * into affected, released
    from dovecote.change_deliveries('discard', actor, reason, filter, changed_before, most);
end $$;

comment on function dovecote.retry_deliveries is
    'Operators: send failed deliveries again at once, a batch of at most 5,000, with its line in the audit log.';
comment on function dovecote.discard_deliveries is
    'Operators: give failed deliveries up, a batch of at most 5,000, with its line in the audit log.';
