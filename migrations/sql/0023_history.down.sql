drop sequence dovecote.relay_beat;
alter table dovecote.relay_state drop column stands_back_for, drop column instance, drop column history;
drop function dovecote.server_run, dovecote.server_started;
