-- Every change by an operator is a function that writes its own line into the audit log, in the same transaction. Logins
-- of operators have no other way to change anything: docs/adr/0037-operators-are-guarded-by-the-database.md.
--
-- Errors: 22023 (invalid_parameter_value) for a request that makes no sense; 55000 (object_not_in_prerequisite_state) for
-- one that is refused as things are; each with one sentence for the operator.

-- The line --------------------------------------------------------------------------------------

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

comment on column dovecote.audit_log.actor is
    'The name the operator gave: a claim. Of a login that is no operator it is the login, or the relay.';
comment on column dovecote.audit_log.login is
    'The database login of the session, also under SET ROLE. Only this is proof of who it was.';

create function dovecote.write_audit_line(
    actor text, action text, reason text, affected bigint, details jsonb) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
-- What an operator was told is done, is not lost in a crash.
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
-- `kinds`: what may be asked -> string, moment, uuid, position, boolean or array. A null would ask for everything where
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
                   when 'moment' then jsonb_typeof(one.value) = 'string'
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
                                      when 'moment' then 'a moment from the year 2000 on, as ISO 8601 with its zone'
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

-- What only code knows, told by the relay that routes it. Null: by a relay that does not tell.
alter table dovecote.subscriptions add column replayable boolean, add column ordered boolean;

comment on column dovecote.subscriptions.replayable is 'Whether the handler''s route lets it act again on what it has acted on.';
comment on column dovecote.subscriptions.ordered is 'Whether the handler''s route keeps the order of each aggregate.';

-- Handlers ----------------------------------------------------------------------------------------

create function dovecote.pause_handler(actor text, reason text, handler text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
begin
    perform dovecote.require_who_and_why(actor, reason, 'a pause needs a reason: others have to know why the handler stands still');
    perform dovecote.require_known(handler);
    insert into dovecote.paused_handlers (handler_name, paused_by, reason) values (handler, actor, reason)
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
                                      jsonb_build_object('handler', handler, 'paused_by', before.paused_by));
    perform dovecote.wake('dovecote_handlers'), dovecote.wake('dovecote_deliveries');
end $$;

create or replace function dovecote.forget_handler(handler text, forgotten_by text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
declare
    ended bigint;
begin
    if dovecote.is_routed(handler) then
        raise exception '% has a route in the relay that leads: deploy code without it before it is forgotten', handler
            using errcode = 'invalid_parameter_value';
    end if;
    delete from dovecote.subscriptions s where s.handler_name = handler;
    get diagnostics ended = row_count;
    delete from dovecote.progress p where p.handler_name = handler;
    if ended > 0 or found then
        perform dovecote.write_audit_line(forgotten_by, 'handler.forgotten', null, ended,
                                          jsonb_build_object('handler', handler, 'subscriptions', ended));
    end if;
    return ended;
end $$;

-- The sequence --------------------------------------------------------------------------------------

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

-- Partitions ----------------------------------------------------------------------------------------
-- Nobody says here who he is: the line has the login twice.

alter function dovecote.ensure_partitions(integer) rename to make_partitions;
alter function dovecote.place_strays() rename to move_strays;

create function dovecote.ensure_partitions(weeks_ahead integer default 4) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- Make the partitions of last week, this week and `weeks_ahead` more; return how many weeks were new.
declare
    made constant integer := dovecote.make_partitions(weeks_ahead);
begin
    if made > 0 then
        perform dovecote.write_audit_line(session_user, 'partitions.made', null, made,
                                          jsonb_build_object('weeks_ahead', weeks_ahead));
    end if;
    return made;
end $$;

create function dovecote.place_strays() returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
-- Move what lies in the default partitions into the partitions of its weeks; return how many rows that were.
declare
    moved constant bigint := dovecote.move_strays();
begin
    if moved > 0 then
        perform dovecote.write_audit_line(session_user, 'partitions.filled', null, moved, '{}');
    end if;
    return moved;
end $$;
