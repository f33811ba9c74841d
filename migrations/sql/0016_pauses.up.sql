-- A paused handler's messages are put aside in Redis, so nothing has to be known of positions.

alter table dovecote.paused_handlers alter column sent_up_to set default 0;

comment on column dovecote.paused_handlers.sent_up_to is 'Not used.';

grant delete on dovecote.paused_handlers to dovecote_operator;
