drop function dovecote.due_deliveries, dovecote.release_parked, dovecote.release_next, dovecote.release, dovecote.release_key;
