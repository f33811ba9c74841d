drop function dovecote.foreign_locks, dovecote.look_at_advisory_locks;
