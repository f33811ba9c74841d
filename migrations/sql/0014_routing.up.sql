-- Which types the leading relay knew how to route, and which it met that it did not.

alter table dovecote.subscriptions add column routed_epoch bigint;

comment on column dovecote.subscriptions.routed_epoch is
    'The last leadership of the relay that routed this type to this handler. If it is not the one before, the relays '
    'in between knew less, and the next that knows it sends what they passed over.';

grant update on dovecote.subscriptions to dovecote_worker;

create table dovecote.unrouted_types (
    event_type     text        not null,
    events         bigint      not null,
    first_position bigint      not null,
    last_position  bigint      not null,
    first_seen_at  timestamptz not null default clock_timestamp(),
    last_seen_at   timestamptz not null default clock_timestamp(),
    constraint unrouted_types_pkey primary key (event_type)
);

comment on table dovecote.unrouted_types is
    'Types that the relay met and no handler wanted then: the events are in the outbox. `events` is about.';

grant select on dovecote.unrouted_types to dovecote_worker, dovecote_operator;
grant insert, update on dovecote.unrouted_types to dovecote_worker;
