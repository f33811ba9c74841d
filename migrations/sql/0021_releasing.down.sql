drop function dovecote.due_deliveries, dovecote.message_bytes, dovecote.release_parked, dovecote.release_next,
              dovecote.release, dovecote.blockers, dovecote.release_key;
