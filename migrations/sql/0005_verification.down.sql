drop table dovecote.verified_phones, dovecote.challenges;
