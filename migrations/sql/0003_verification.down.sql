drop table dovecote.verification_quotas, dovecote.verified_phones, dovecote.challenges;
