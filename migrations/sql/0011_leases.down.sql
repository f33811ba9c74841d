alter table dovecote.deliveries drop column leased_until;
