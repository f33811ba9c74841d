drop function dovecote.wake;
