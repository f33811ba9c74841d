drop table dovecote.billing_history, dovecote.memberships;
