drop function dovecote.processed_lately, dovecote.fact_of;
drop table dovecote.paused_handlers, dovecote.subscriptions, dovecote.deliveries, dovecote.processed_events;
