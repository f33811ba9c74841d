drop function dovecote.not_in_outbox;
