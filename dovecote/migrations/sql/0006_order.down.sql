drop function dovecote.due_retries, dovecote.release_parked, dovecote.release_next, dovecote.release,
              dovecote.share_release_lock, dovecote.release_key, dovecote.blockers, dovecote.blocker;
