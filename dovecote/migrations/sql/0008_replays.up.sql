-- Replays are asked for, paused, resumed and cancelled here; the relay does them (dovecote/relay/replayer.py), wave by
-- wave. What is in a replay is said there as well (dovecote/store/replays.py): the count and the work must mean the same events.

create table dovecote.replays (
    id           uuid        not null default dovecote.uuid_v7(),
    actor        text        not null,
    reason       text        not null,
    mode         text        not null,
    handler_name text        not null,
    filter       jsonb       not null,
    state        text        not null default 'pending',
    total        bigint,
    done         bigint      not null default 0,
    -- How far all is recorded: processed, or in `deliveries`.
    cursor_position bigint   not null default 0,
    created_at   timestamptz not null default clock_timestamp(),
    updated_at   timestamptz not null default clock_timestamp(),
    -- Most events a second; null is as fast as they are acted on.
    rate         integer,
    -- The last position that matched when the replay was asked for.
    upto_position bigint     not null default 0,
    -- For a replay of single events: where they are.
    positions    int8multirange,
    finished_at  timestamptz,
    problem      text,
    constraint replays_pkey primary key (id),
    constraint replays_mode_is_known check (mode in ('backfill', 'reprocess')),
    constraint replays_state_is_known check (state in ('pending', 'running', 'paused', 'cancelled', 'done'))
);

comment on column dovecote.replays.problem is
    'Why the relay that leads does not carry the replay out; null where it does. Another version may.';

-- Two at once for one handler would each take the other's events for done.
create unique index replays_active_idx on dovecote.replays (handler_name)
    where state in ('pending', 'running', 'paused');

create function dovecote.is_asked(o dovecote.outbox, filter jsonb, event_types text[], event_ids uuid[]) returns boolean
language sql stable parallel safe
-- Ids begin with their time: a range of time is a range of the primary key.
return o.event_type = any(event_types)
    and (event_ids is null or o.id = any(event_ids))
    and (filter ->> 'aggregate_type' is null or o.aggregate_type = filter ->> 'aggregate_type')
    and (filter ->> 'aggregate_id' is null or o.aggregate_id = filter ->> 'aggregate_id')
    and (filter ->> 'since' is null or o.id >= dovecote.uuid_v7_lower_bound((filter ->> 'since')::timestamptz))
    and (filter ->> 'until' is null or o.id < dovecote.uuid_v7_lower_bound((filter ->> 'until')::timestamptz))
    and (filter ->> 'from_position' is null or o.position >= (filter ->> 'from_position')::bigint)
    and (filter ->> 'upto_position' is null or o.position <= (filter ->> 'upto_position')::bigint);

create function dovecote.is_replayed(
    mode text, p dovecote.processed_events, d dovecote.deliveries, asked_at timestamptz) returns boolean
language sql stable parallel safe
-- Of an event's rows for the handler. What happens after the replay was asked for does not take an event out of it.
return case mode
    when 'backfill' then (p.event_id is null or p.processed_at > asked_at)
                        and (d.event_id is null or d.first_failed_at > asked_at)
    else p.processed_at <= asked_at and d.event_id is null end;

create function dovecote.plan_replay(
    handler text, mode text, filter jsonb, inout event_types text[], event_ids uuid[] default null,
    keeps_order boolean default false, out asked_at timestamptz, out events bigint, out left_alone bigint,
    out first_position bigint, out last_position bigint, out positions int8multirange)
language plpgsql set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan as $$
-- Count exactly what a replay would do; nothing is changed. `event_types`: what the handler takes as far as the caller
-- knows. What the relay that leads routes to it, or what the filter asks for, goes before that, and is returned.
-- `positions`: where single events are.
declare
    routed  record;
    counted record;
    because text;
    began   bigint;
begin
    perform dovecote.require_keys(filter, '{"event_types": "array", "aggregate_type": "string", "aggregate_id": "string",
        "since": "timestamp", "until": "timestamp", "from_position": "position", "upto_position": "position"}');
    perform dovecote.require_known(handler);
    because := case
        when mode is null or mode not in ('backfill', 'reprocess') then 'the mode of a replay is backfill or reprocess'
        when filter ? 'aggregate_id' and not filter ? 'aggregate_type' then 'an aggregate''s id needs its type too'
        when (filter ->> 'since')::timestamptz >= (filter ->> 'until')::timestamptz then
            format('the range of time ends (%s) before it begins (%s)', filter ->> 'until', filter ->> 'since')
        when (filter ->> 'from_position')::bigint > (filter ->> 'upto_position')::bigint then
            format('the range of positions ends (%s) before it begins (%s)', filter ->> 'upto_position', filter ->> 'from_position')
        when coalesce(cardinality(event_ids), 1) not between 1 and 100000 then
            format('1 to 100,000 event ids are taken, got %s', cardinality(event_ids))
        end;
    if because is not null then
        raise exception '%', because using errcode = 'invalid_parameter_value';
    end if;
    select array_agg(s.event_type) as event_types, bool_or(s.ordered) as ordered into routed
    from dovecote.subscriptions s, dovecote.relay_state r
    where s.handler_name = handler and s.routed_epoch = r.epoch;
    keeps_order := keeps_order or coalesce(routed.ordered, false);
    event_types := coalesce((select array_agg(t) from jsonb_array_elements_text(filter -> 'event_types') as t),
                            routed.event_types, event_types);
    if mode = 'reprocess' and exists (select from dovecote.subscriptions s where s.handler_name = handler and not s.replayable) then
        raise exception '% may not process events again: its route says so; --mode backfill is possible', handler
            using errcode = 'object_not_in_prerequisite_state';
    end if;

    asked_at := clock_timestamp();
    -- Assigned, and not selected into: Postgres reads in parallel then.
    counted := (select c from (
        select count(*) as events, min(o.position) as first, max(o.position) as last
        from dovecote.outbox o
        left join dovecote.processed_events p on p.event_id = o.id and p.handler_name = handler
        left join dovecote.deliveries d on d.event_id = o.id and d.handler_name = handler
        where dovecote.is_asked(o, filter, event_types, event_ids) and dovecote.is_replayed(mode, p, d, asked_at)
    ) c);
    select counted.events, counted.first, counted.last into events, first_position, last_position;
    select count(*) into left_alone
    from dovecote.deliveries d join dovecote.outbox o on o.id = d.event_id
    where d.handler_name = handler and dovecote.is_asked(o, filter, event_types, event_ids);
    if events = 0 then
        raise exception 'there is nothing to replay: no event matches, or %', format(
                case mode when 'backfill' then '%s has acted on all that match%s'
                              else '%s has acted on none that match%s' end, handler,
                case when left_alone > 0 then format('; %s are in deliveries: see `dovecote deliveries`', left_alone) end)
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    if keeps_order and mode = 'backfill' then
        -- The handler began here: what lies at or below, but for gaps, was published before it wanted to know.
        select greatest(s.since_position, upper(s.published_above) - 1) into began
        from dovecote.subscriptions s
        where s.handler_name = handler and s.event_type = any(event_types)
          and exists (select from dovecote.outbox o
                      left join dovecote.processed_events p on p.event_id = o.id and p.handler_name = handler
                      left join dovecote.deliveries d on d.event_id = o.id and d.handler_name = handler
                      where dovecote.is_asked(o, filter, event_types, event_ids)
                        and dovecote.is_replayed(mode, p, d, asked_at) and o.event_type = s.event_type
                        and (o.position <= s.since_position or s.published_above @> o.position))
        order by 1 desc limit 1;
        if found then
            raise exception '% keeps the order of each aggregate and has its events from position % on: earlier ones cannot be delivered in order any more; ask with --from-position %',
                            handler, began + 1, began + 1
                using errcode = 'object_not_in_prerequisite_state';
        end if;
    end if;
    if event_ids is not null then
        select range_agg(int8range(o.position, o.position, '[]')) into positions
        from dovecote.outbox o
        left join dovecote.processed_events p on p.event_id = o.id and p.handler_name = handler
        left join dovecote.deliveries d on d.event_id = o.id and d.handler_name = handler
        where dovecote.is_asked(o, filter, event_types, event_ids) and dovecote.is_replayed(mode, p, d, asked_at);
    end if;
end $$;

create function dovecote.start_replay(
    actor text, reason text, handler text, mode text, filter jsonb, event_types text[],
    event_ids uuid[] default null, rate integer default null, keeps_order boolean default false,
    out id uuid, out asked_at timestamptz, out events bigint, out left_alone bigint, out first_position bigint,
    out last_position bigint, out counted_types text[])
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
declare
    plan  record;
    other record;
begin
    perform dovecote.require_who_and_why(actor, reason, 'a replay needs a reason: it is written into the audit log');
    if rate < 1 then
        raise exception 'the rate is in events a second, at least 1; got %', rate using errcode = 'invalid_parameter_value';
    end if;
    select * into plan from dovecote.plan_replay(handler, mode, filter, event_types, event_ids, keeps_order);
    select plan.asked_at, plan.events, plan.left_alone, plan.first_position, plan.last_position, plan.event_types
        into asked_at, events, left_alone, first_position, last_position, counted_types;
    begin
        insert into dovecote.replays as r (actor, reason, mode, handler_name, filter, total, cursor_position,
                                           upto_position, positions, rate, created_at, updated_at)
        values (actor, reason, mode, handler, filter, plan.events, plan.first_position - 1,
                plan.last_position, plan.positions, rate, plan.asked_at, plan.asked_at)
        returning r.id into id;
    exception when unique_violation then
        select r.id, r.state into other from dovecote.replays r
        where r.handler_name = handler and r.state in ('pending', 'running', 'paused');
        raise exception '%', case when found
                then format('%s has a replay already: %s (%s); wait for it, or cancel it', handler, other.id, other.state)
                else format('another replay of %s began at the same time; try again', handler) end
            using errcode = 'object_not_in_prerequisite_state';
    end;
    perform dovecote.write_audit_line(
        actor, 'replay.start', reason, plan.events,
        jsonb_build_object('replay', id, 'handler', handler, 'mode', mode, 'rate', rate, 'filter', filter ||
            case when event_ids is null then '{}' else jsonb_build_object('event_ids', cardinality(event_ids)) end));
    perform dovecote.wake('dovecote_replays');
end $$;

comment on function dovecote.start_replay is
    'Operators: have the relay send events to a handler again, with its line in the audit log. Returns the id and the plan.';

create function dovecote.change_replay(verb text, actor text, reason text, replay uuid, from_states text[], to_state text)
returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    before  dovecote.replays;
    details jsonb;
    retries bigint;
begin
    select r.* into before from dovecote.replays r where r.id = replay for update;
    if not found then
        raise exception 'there is no replay %; see `dovecote replay list`', replay
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    if before.state <> all(from_states) then
        raise exception 'replay % is %: there is nothing to %', replay, before.state, verb
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    update dovecote.replays r
    set state = to_state, updated_at = clock_timestamp(),
        finished_at = case when to_state = 'cancelled' then clock_timestamp() end
    where r.id = replay;
    details := jsonb_build_object('replay', replay, 'handler', before.handler_name, 'done', before.done,
                                  'total', coalesce(before.total, 0));
    if to_state = 'cancelled' then
        delete from dovecote.deliveries d where d.replay_id = replay and d.state in ('retrying', 'waiting');
        get diagnostics retries = row_count;
        details := details || jsonb_build_object('retries_deleted', retries);
    end if;
    perform dovecote.write_audit_line(actor, 'replay.' || verb, reason, before.done, details);
    perform dovecote.wake('dovecote_replays');
end $$;

create function dovecote.pause_replay(actor text, reason text, replay uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform dovecote.change_replay('pause', actor, reason, replay, '{pending,running}', 'paused');
end $$;

create function dovecote.resume_replay(actor text, reason text, replay uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform dovecote.change_replay('resume', actor, reason, replay, '{paused}', 'running');
end $$;

create function dovecote.cancel_replay(actor text, reason text, replay uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform dovecote.change_replay('cancel', actor, reason, replay, '{pending,running,paused}', 'cancelled');
end $$;

-- Rights ---------------------------------------------------------------------------------------
-- A replay is started by an operator, and the relay says how far it is.

grant select on dovecote.replays to dovecote_worker, dovecote_operator, dovecote_viewer;
grant update (state, done, cursor_position, updated_at, finished_at, problem)
    on dovecote.replays to dovecote_worker;
grant execute on function dovecote.is_asked, dovecote.is_replayed, dovecote.plan_replay
    to dovecote_operator, dovecote_viewer;
grant execute on function dovecote.start_replay, dovecote.pause_replay, dovecote.resume_replay, dovecote.cancel_replay
    to dovecote_operator;
