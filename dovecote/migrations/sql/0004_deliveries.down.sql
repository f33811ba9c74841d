drop function dovecote.processed_lately, dovecote.event_name;
drop table dovecote.paused_handlers, dovecote.subscriptions, dovecote.deliveries, dovecote.processed_events;
