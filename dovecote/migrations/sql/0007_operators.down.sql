drop function dovecote.discard_deliveries, dovecote.retry_deliveries, dovecote.release_behind,
              dovecote.change_deliveries, dovecote.count_changeable, dovecote.is_changeable,
              dovecote.changeable_states, dovecote.in_outbox,
              dovecote.unsubscribe_handler, dovecote.resume_handler, dovecote.pause_handler, dovecote.require_known,
              dovecote.is_routed, dovecote.require_keys, dovecote.require_who_and_why, dovecote.write_audit_line;
drop table dovecote.audit_log;
drop function dovecote.check_audit_line;
