revoke delete on dovecote.verified_phones from dovecote_worker, dovecote_service;
drop table dovecote.verification_quotas;
