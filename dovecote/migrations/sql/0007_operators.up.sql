-- Every change by an operator is a function that writes its own line into the audit log, in the same transaction. Logins
-- of operators have no other way to change anything: docs/adr/0037-operators-privileges.md.
--
-- Errors: 22023 (invalid_parameter_value) for a request that makes no sense; 55000 (object_not_in_prerequisite_state) for
-- one that is refused as things are; each with one sentence for the operator.

-- The audit log ---------------------------------------------------------------------------------

create table dovecote.audit_log (
    id         uuid        not null default dovecote.uuid_v7(),
    at         timestamptz not null default clock_timestamp(),
    actor      text        not null,
    action     text        not null,
    reason     text,
    details    jsonb       not null default '{}',
    login      text        not null default session_user,
    affected   bigint,
    constraint audit_log_pkey primary key (id)
);

comment on table dovecote.audit_log is 'What operators did. Added to only: nobody but the owner may change or remove a row.';
comment on column dovecote.audit_log.actor is
    'The name the operator gave: a claim. Of a login that is no operator it is the login, or the relay.';
comment on column dovecote.audit_log.login is
    'The database login of the session, also under SET ROLE. Only this is proof of who it was.';

create function dovecote.check_audit_line() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- What is in a line is claimed, but for `at`, `login` and what the verbs count. The claims are bounded here, for every
-- way into the table. Invoker's rights: the current user is the owner inside a verb, and the login elsewhere.
begin
    if coalesce(btrim(new.actor), '') = '' then
        raise exception 'who does this? The audit log wants a name' using errcode = 'invalid_parameter_value';
    end if;
    if length(new.actor) > 200 or new.actor ~ '[\u0001-\u001f\u007f-\u009f]' then
        raise exception 'the name for the audit log has at most 200 characters, none of them a control character'
            using errcode = 'invalid_parameter_value';
    end if;
    if length(new.reason) > 2000 or new.reason ~ '[\u0001-\u0008\u000b-\u001f\u007f-\u009f]' then
        raise exception 'the reason for the audit log has at most 2000 characters, none of them a control character'
            using errcode = 'invalid_parameter_value';
    end if;
    -- The engine's login has a few lines of its own to write, and none in the name of anybody else. The relay of the
    -- release before writes them by INSERT.
    if not pg_has_role(current_user, 'dovecote_owner', 'usage')
       and (new.actor <> 'relay' or new.action not in ('replay.done', 'sequence.recover')) then
        raise exception 'login % may write lines of the relay into the audit log, and no others', session_user
            using errcode = 'insufficient_privilege';
    end if;
    if new.actor !~ '^relay(@[!-~]*)?$' and not pg_has_role(session_user, 'dovecote_operator', 'member')
       and not pg_has_role(session_user, 'dovecote_owner', 'member') then
        new.actor := session_user;
    end if;
    return new;
end $$;

create trigger check_audit_line before insert on dovecote.audit_log
    for each row execute function dovecote.check_audit_line();

create function dovecote.write_audit_line(
    actor text, action text, reason text, affected bigint, details jsonb) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- What was reported to an operator as done is not lost in a crash.
begin
    if current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    insert into dovecote.audit_log (actor, action, reason, affected, details)
    values (actor, action, reason, affected, details);
end $$;

-- What is asked for -------------------------------------------------------------------------------

create function dovecote.require_who_and_why(actor text, reason text, why text) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
    if coalesce(btrim(actor), '') = '' then
        raise exception 'who does this? The audit log wants a name' using errcode = 'invalid_parameter_value';
    end if;
    if coalesce(btrim(reason, E' \t\n'), '') = '' then
        raise exception '%', why using errcode = 'invalid_parameter_value';
    end if;
end $$;

create function dovecote.require_keys(filter jsonb, kinds jsonb) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
-- `kinds`: what may be asked -> string, timestamp, uuid, position, boolean or array. A null would ask for everything where
-- something was meant, so it is refused.
declare
    one  record;
    kind text;
begin
    if filter is null or jsonb_typeof(filter) <> 'object' then
        raise exception 'the filter must be a JSON object; an empty one, {}, asks for everything'
            using errcode = 'invalid_parameter_value';
    end if;
    if length(filter::text) > 20000 then
        raise exception 'the filter has more than 20000 characters' using errcode = 'invalid_parameter_value';
    end if;
    for one in select key, value, value #>> '{}' as words from jsonb_each(filter) loop
        kind := kinds ->> one.key;
        if kind is null then
            raise exception 'the filter has an unknown key, %; known are %', left(to_json(one.key)::text, 80),
                            (select string_agg(known, ', ' order by known) from jsonb_object_keys(kinds) as known)
                using errcode = 'invalid_parameter_value';
        end if;
        begin
            if not (case kind
                   when 'string' then jsonb_typeof(one.value) = 'string'
                   when 'boolean' then jsonb_typeof(one.value) = 'boolean'
                   when 'uuid' then jsonb_typeof(one.value) = 'string' and one.words::uuid is not null
                   when 'position' then jsonb_typeof(one.value) = 'number' and one.words ~ '^[1-9][0-9]{0,17}$'
                   -- As ISO 8601 with its zone: what relays read as well, and the same in every session.
                   when 'timestamp' then jsonb_typeof(one.value) = 'string'
                       and one.words ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}([.][0-9]{1,6})?)?([+-][0-9]{2}:[0-9]{2}|Z)$'
                       and one.words::timestamptz >= timestamptz '2000-01-01 00:00:00+00'
                   when 'array' then jsonb_typeof(one.value) = 'array' and jsonb_array_length(one.value) between 1 and 100
                       and not jsonb_path_exists(one.value, '$[*] ? (@.type() != "string")')
               end) then
                raise data_exception;
            end if;
        exception when data_exception then
            raise exception 'the filter''s % must be %, not %', one.key,
                            case kind when 'string' then 'a text' when 'uuid' then 'a UUID' when 'boolean' then 'true or false'
                                      when 'position' then 'a position, a number from 1 on'
                                      when 'timestamp' then 'a timestamp from the year 2000 on, as ISO 8601 with its zone'
                                      else 'a list of 1 to 100 texts' end,
                            left(one.value::text, 80)
                using errcode = 'invalid_parameter_value';
        end;
    end loop;
end $$;

create function dovecote.is_routed(handler text) returns boolean
language sql stable
begin atomic
    -- Whether the relay that leads, or led last, has a route of this handler.
    select exists (select from dovecote.subscriptions s, dovecote.relay_state r
                   where s.handler_name = handler and s.routed_epoch = r.epoch);
end;

create function dovecote.require_known(handler text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
-- Before the first relay has led, no handler is known here.
begin
    if handler is null or not exists (select from dovecote.subscriptions s where s.handler_name = handler)
                          and exists (select from dovecote.subscriptions) then
        raise exception 'there is no handler %; there are %', coalesce(left(quote_literal(handler), 80), 'without a name'),
                        (select string_agg(distinct s.handler_name, ', ') from dovecote.subscriptions s)
            using errcode = 'invalid_parameter_value';
    end if;
end $$;

-- Handlers ----------------------------------------------------------------------------------------

create function dovecote.pause_handler(actor text, reason text, handler text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
begin
    perform dovecote.require_who_and_why(actor, reason, 'a pause needs a reason: others have to know why the handler stands still');
    perform dovecote.require_known(handler);
    insert into dovecote.paused_handlers (handler_name, actor, reason) values (handler, actor, reason)
    on conflict do nothing;
    if not found then
        raise exception '% is paused already; look at `dovecote handlers list`', handler
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    perform dovecote.write_audit_line(actor, 'handlers.pause', reason, null, jsonb_build_object('handler', handler));
    perform dovecote.wake('dovecote_handlers'), dovecote.wake('dovecote_deliveries');
end $$;

create function dovecote.resume_handler(actor text, reason text, handler text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
declare
    before dovecote.paused_handlers;
begin
    delete from dovecote.paused_handlers p where p.handler_name = handler returning p.* into before;
    if not found then
        raise exception '% is not paused; look at `dovecote handlers list`', coalesce(left(handler, 80), 'a handler without a name')
            using errcode = 'object_not_in_prerequisite_state';
    end if;
    perform dovecote.write_audit_line(actor, 'handlers.resume', reason, null,
                                      jsonb_build_object('handler', handler, 'pause_actor', before.actor));
    perform dovecote.wake('dovecote_handlers'), dovecote.wake('dovecote_deliveries');
end $$;

create function dovecote.unsubscribe_handler(handler text, actor text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
declare
    ended bigint;
begin
    if dovecote.is_routed(handler) then
        raise exception '% has a route in the relay that leads: deploy code without it before it is unsubscribed', handler
            using errcode = 'invalid_parameter_value';
    end if;
    delete from dovecote.subscriptions s where s.handler_name = handler;
    get diagnostics ended = row_count;
    delete from dovecote.progress p where p.handler_name = handler;
    if ended > 0 or found then
        perform dovecote.write_audit_line(actor, 'handlers.unsubscribe', null, ended,
                                          jsonb_build_object('handler', handler, 'subscriptions', ended));
    end if;
    return ended;
end $$;

-- Failures ----------------------------------------------------------------------------------------
-- Send again at once, or give up. Waiting events follow the one they wait for.

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
        "event_type": "string", "aggregate_type": "string", "aggregate_id": "string", "since": "timestamp",
        "event_id": "uuid", "without_route": "boolean"}');
    if filter ? 'event_id' and not filter ? 'handler' then
        raise exception 'a single delivery is named by its handler and its event' using errcode = 'invalid_parameter_value';
    end if;
    if verb is null or verb not in ('retry', 'discard') then
        raise exception 'deliveries are retried or discarded' using errcode = 'invalid_parameter_value';
    end if;
    possible := '{dead,retrying}';
    if verb = 'discard' and coalesce((filter ->> 'without_route')::boolean, false) then
        -- No handler receives the following events, so their order no longer matters.
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
-- One batch: at most `most` deliveries last changed before that time, with one line of the audit log. The rest is for
-- the next call: a transaction holds the locks of 5,000 rows for some 200 ms.
declare
    states   constant text[] := dovecote.changeable_states(verb, filter);
    handlers text[];
    events   uuid[];
begin
    if changed_before is null or most is null or most not between 1 and 5000 then
        raise exception 'a batch is of 1 to 5000 deliveries that were last changed before a given time'
            using errcode = 'invalid_parameter_value';
    end if;
    affected := 0;
    released := 0;
    -- One that is being tried is locked by its worker. A group leaves it alone; a single one is waited for.
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
    -- An event that is being parked behind one of these is examined again after it is parked and this has committed.
    perform dovecote.share_release_lock(h) from (select distinct unnest(handlers) as h order by 1) as d;
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

-- Rights ---------------------------------------------------------------------------------------
-- Not on the time, the login and the id of an audit line: the database sets those.
-- An operator changes rows only through these functions. A dry run counts with the caller's privileges.

grant select on dovecote.audit_log to dovecote_worker, dovecote_operator, dovecote_viewer;
grant insert (actor, action, reason, details, affected) on dovecote.audit_log to dovecote_worker;
grant execute on function
    dovecote.require_keys, dovecote.is_routed, dovecote.require_known, dovecote.in_outbox, dovecote.changeable_states,
    dovecote.is_changeable, dovecote.count_changeable
    to dovecote_operator, dovecote_viewer;
grant execute on function
    dovecote.pause_handler, dovecote.resume_handler, dovecote.unsubscribe_handler, dovecote.retry_deliveries,
    dovecote.discard_deliveries
    to dovecote_operator;
