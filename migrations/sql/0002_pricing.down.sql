drop table dovecote.latest_prices, dovecote.price_quotes;
