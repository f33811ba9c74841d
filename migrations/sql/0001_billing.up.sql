-- Memberships, and the history the billing consumer keeps of what happened to them.

create table dovecote.memberships (
    id                     uuid        not null,
    user_id                text        not null,
    tier                   varchar(20) not null,
    status                 varchar(20) not null,
    stripe_customer_id     text,
    stripe_subscription_id text,
    current_period_start   timestamptz,
    current_period_end     timestamptz,
    version                integer     not null,
    constraint memberships_pkey primary key (id),
    constraint memberships_one_per_stripe_subscription unique (stripe_subscription_id),
    constraint memberships_tier_is_known check (tier in ('free', 'monthly', 'annual')),
    constraint memberships_status_is_known check (status in ('pending', 'active', 'cancelled', 'expired')),
    constraint memberships_period_has_both_ends
        check ((current_period_start is null) = (current_period_end is null)),
    constraint memberships_period_ends_after_it_starts check (current_period_start < current_period_end),
    constraint memberships_free_tier_has_no_period check (tier <> 'free' or current_period_end is null),
    constraint memberships_active_paid_tier_has_a_period
        check (status <> 'active' or tier = 'free' or current_period_end is not null)
) with (fillfactor = 80);

comment on table dovecote.memberships is
    'One row per membership. Its row is locked before each of its events is written: that keeps them in order.';

create index memberships_user_idx on dovecote.memberships (user_id);

-- No foreign key to memberships: an event may come from a writer whose memberships live elsewhere.
create table dovecote.billing_history (
    id              bigint      not null generated always as identity,
    membership_id   uuid        not null,
    user_id         text        not null,
    event_type      text        not null,
    amount_minor    bigint,
    currency        text,
    invoice_id      text,
    description     text        not null,
    occurred_at     timestamptz not null,
    source_event_id uuid        not null,
    recorded_at     timestamptz not null default clock_timestamp(),
    constraint billing_history_pkey primary key (id),
    constraint billing_history_one_line_per_event unique (source_event_id),
    constraint billing_history_amount_has_a_currency check ((amount_minor is null) = (currency is null)),
    constraint billing_history_currency_is_three_capitals check (currency ~ '^[A-Z]{3}$')
);

comment on table dovecote.billing_history is 'One line per event of billing, written once and never changed.';
comment on column dovecote.billing_history.amount_minor is
    'Whole minor units of the currency; negative for money that went back.';

create index billing_history_membership_idx on dovecote.billing_history (membership_id, occurred_at);

grant select on dovecote.memberships, dovecote.billing_history to dovecote_operator, dovecote_viewer;
grant select, insert, update on dovecote.memberships to dovecote_service, dovecote_worker;
grant select, insert on dovecote.billing_history to dovecote_service, dovecote_worker;
