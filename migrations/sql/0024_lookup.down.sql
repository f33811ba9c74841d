drop function dovecote.not_in_outbox, dovecote.outbox_run;
