drop table dovecote.unrouted_types;
revoke update on dovecote.subscriptions from dovecote_worker;
alter table dovecote.subscriptions drop column routed_epoch;
