drop function dovecote.due_retries;
drop index dovecote.deliveries_due_of_handler_idx;
alter table dovecote.deliveries drop column first_leased_at;
