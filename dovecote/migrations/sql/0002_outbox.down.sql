drop function dovecote.append_event, dovecote.refusal;
drop table dovecote.outbox;
drop sequence dovecote.outbox_position;
drop function dovecote.check_event, dovecote.json_text_bytes, dovecote.announce, dovecote.writer_key, dovecote.wakeup_key,
              dovecote.wake, dovecote.uuid_v7_time, dovecote.uuid_v7_lower_bound, dovecote.uuid_v7;
alter default privileges grant execute on functions to public;
