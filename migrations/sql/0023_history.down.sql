drop function dovecote.server_run, dovecote.server_started;
