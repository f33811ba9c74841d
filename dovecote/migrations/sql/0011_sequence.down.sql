drop function dovecote.recover, dovecote.recover_sequence, dovecote.never_read, dovecote.sequence_fault,
              dovecote.sequence_state;
