-- Who may do what. tests/security/test_grants.py has the whole matrix in plain form.

revoke all on function
    dovecote.check_audit_line, dovecote.write_audit_line, dovecote.require_who_and_why, dovecote.require_keys,
    dovecote.is_routed, dovecote.require_known, dovecote.pause_handler, dovecote.resume_handler,
    dovecote.forget_handler, dovecote.recover, dovecote.ensure_partitions, dovecote.place_strays,
    dovecote.make_partitions, dovecote.move_strays, dovecote.in_outbox, dovecote.changeable_states,
    dovecote.is_changeable, dovecote.count_changeable, dovecote.change_deliveries, dovecote.release_behind,
    dovecote.retry_deliveries, dovecote.discard_deliveries, dovecote.is_asked, dovecote.is_replayed,
    dovecote.plan_replay, dovecote.start_replay, dovecote.change_replay, dovecote.pause_replay,
    dovecote.resume_replay, dovecote.cancel_replay
    from public;
-- Granted under their old names: only the new ones may be called.
revoke all on function dovecote.make_partitions, dovecote.move_strays from dovecote_worker, dovecote_operator;

-- The verbs.
grant execute on function
    dovecote.pause_handler, dovecote.resume_handler, dovecote.retry_deliveries, dovecote.discard_deliveries,
    dovecote.start_replay, dovecote.pause_replay, dovecote.resume_replay, dovecote.cancel_replay
    to dovecote_operator;
grant execute on function dovecote.recover, dovecote.ensure_partitions, dovecote.place_strays
    to dovecote_operator, dovecote_worker;
-- What they would do: counted with the rights of who asks.
grant execute on function
    dovecote.require_keys, dovecote.is_routed, dovecote.require_known, dovecote.in_outbox, dovecote.changeable_states,
    dovecote.is_changeable, dovecote.count_changeable, dovecote.is_asked, dovecote.is_replayed, dovecote.plan_replay
    to dovecote_operator, dovecote_viewer;

-- An operator changes nothing but through a verb.
revoke insert, update, delete on dovecote.deliveries from dovecote_operator;
revoke insert, update on dovecote.replays from dovecote_operator;
revoke insert, update, delete on dovecote.paused_handlers from dovecote_operator;
revoke insert (actor, action, reason, affected, details) on dovecote.audit_log from dovecote_operator;
revoke execute on function dovecote.recover_sequence, dovecote.reopen_progress from dovecote_operator;

-- The engine writes what it writes, and no more. Where a delivery belongs is written once. A replay is started by an
-- operator, and the relay says how far it is.
revoke insert, update on dovecote.deliveries from dovecote_worker;
grant insert (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state, attempts,
              next_attempt_at, error_type, error_fingerprint, error, trace_id, replay_id),
      update (state, attempts, next_attempt_at, error_type, error_fingerprint, error, trace_id, replay_id,
              leased_until, first_leased_at, updated_at)
    on dovecote.deliveries to dovecote_worker;
revoke insert, update on dovecote.replays from dovecote_worker;
grant update (state, done, cursor_position, updated_at, finished_at) on dovecote.replays to dovecote_worker;
revoke update on dovecote.subscriptions from dovecote_worker;
grant update (routed_epoch, replayable, ordered) on dovecote.subscriptions to dovecote_worker;
revoke update on dovecote.processed_events from dovecote_worker;
grant update (replay_id, processed_at) on dovecote.processed_events to dovecote_worker;
revoke update, delete on dovecote.paused_handlers from dovecote_worker;
