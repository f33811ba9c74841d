-- Quotes as they came in, and the latest price of each symbol, kept by the pricing consumer.

create table dovecote.price_quotes (
    symbol      text           not null,
    as_of       timestamptz    not null,
    price       numeric(38,18) not null,
    recorded_at timestamptz    not null default clock_timestamp(),
    constraint price_quotes_pkey primary key (symbol, as_of),
    constraint price_quotes_price_is_positive check (price > 0)
);

comment on table dovecote.price_quotes is 'The history: what a source quoted for a symbol at a time; the last quote wins.';

create table dovecote.latest_prices (
    symbol         text           not null,
    price          numeric(38,18) not null,
    as_of          timestamptz    not null,
    position       bigint         not null,
    quotes_applied bigint         not null,
    constraint latest_prices_pkey primary key (symbol)
) with (fillfactor = 50);

comment on column dovecote.latest_prices.position is
    'Outbox position of the quote that set the price: decides between two quotes of the same time.';
comment on column dovecote.latest_prices.quotes_applied is
    'How many quotes the consumer has acted on for this symbol, older ones included.';

grant select on dovecote.price_quotes, dovecote.latest_prices to dovecote_operator, dovecote_viewer;
grant select, insert, update on dovecote.price_quotes, dovecote.latest_prices to dovecote_service, dovecote_worker;
