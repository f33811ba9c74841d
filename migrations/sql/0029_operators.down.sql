drop function dovecote.pause_replay, dovecote.resume_replay, dovecote.cancel_replay, dovecote.change_replay,
              dovecote.start_replay, dovecote.plan_replay, dovecote.is_replayed, dovecote.is_asked;
drop function dovecote.discard_deliveries, dovecote.retry_deliveries, dovecote.release_behind,
              dovecote.change_deliveries, dovecote.count_changeable, dovecote.is_changeable,
              dovecote.changeable_states, dovecote.in_outbox;
drop function dovecote.place_strays, dovecote.ensure_partitions, dovecote.recover, dovecote.pause_handler,
              dovecote.resume_handler;

alter function dovecote.make_partitions rename to ensure_partitions;
alter function dovecote.move_strays rename to place_strays;
grant execute on function dovecote.ensure_partitions, dovecote.place_strays to dovecote_worker, dovecote_operator;

create or replace function dovecote.forget_handler(handler text, forgotten_by text) returns bigint
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
    ended bigint;
begin
    delete from dovecote.subscriptions s where s.handler_name = handler;
    get diagnostics ended = row_count;
    delete from dovecote.progress p where p.handler_name = handler;
    if ended > 0 then
        insert into dovecote.audit_log (actor, action, details)
        values (forgotten_by, 'handler.forgotten', jsonb_build_object('handler', handler, 'subscriptions', ended));
    end if;
    return ended;
end $$;

drop function dovecote.require_known, dovecote.is_routed, dovecote.require_keys, dovecote.require_who_and_why,
              dovecote.write_audit_line;
drop trigger check_audit_line on dovecote.audit_log;
drop function dovecote.check_audit_line;
alter table dovecote.subscriptions drop column replayable, drop column ordered;

comment on column dovecote.audit_log.actor is 'The name the operator gave.';
comment on column dovecote.audit_log.login is 'The database login, which is what was authenticated.';

grant insert, update, delete on dovecote.deliveries to dovecote_operator, dovecote_worker;
grant insert, update on dovecote.replays to dovecote_operator, dovecote_worker;
grant insert, update, delete on dovecote.paused_handlers to dovecote_operator;
grant update, delete on dovecote.paused_handlers to dovecote_worker;
grant insert (actor, action, reason, affected, details) on dovecote.audit_log to dovecote_operator;
grant execute on function dovecote.recover_sequence, dovecote.reopen_progress to dovecote_operator;
grant update on dovecote.subscriptions, dovecote.processed_events to dovecote_worker;
-- Column by column no longer.
revoke insert (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state, attempts,
               next_attempt_at, error_type, error_fingerprint, error, trace_id, replay_id),
       update (state, attempts, next_attempt_at, error_type, error_fingerprint, error, trace_id, replay_id,
               leased_until, first_leased_at, updated_at)
    on dovecote.deliveries from dovecote_worker;
