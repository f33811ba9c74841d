"""The tables of pricing and all SQL on them: a bundle of quotes is one statement, no ORM per quote."""

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Numeric, Table, Text, func, select, text

from domain.pricing.events import PriceQuoted
from domain.pricing.price import Price, Quote
from dovecote.database import array, metadata
from dovecote.unit_of_work import UnitOfWork

price_quotes = Table(
    "price_quotes",
    metadata,
    Column("symbol", Text, primary_key=True),
    Column("as_of", DateTime(timezone=True), primary_key=True),
    Column("price", Numeric(38, 18), nullable=False),
    Column("recorded_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
    CheckConstraint("price > 0", name="price_quotes_price_is_positive"),
)

latest_prices = Table(
    "latest_prices",
    metadata,
    Column("symbol", Text, primary_key=True),
    Column("price", Numeric(38, 18), nullable=False),
    Column("as_of", DateTime(timezone=True), nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("quotes_applied", BigInteger, nullable=False),
)

# Sorted by key, so that two transactions with the same symbols wait for each other instead of deadlocking.
_record = text(
    """
    insert into dovecote.price_quotes (symbol, as_of, price)
    select * from unnest(cast(:symbols as text[]), cast(:times as timestamptz[]), cast(:prices as numeric[]))
        as quote (symbol, as_of, price)
    order by symbol, as_of
    on conflict (symbol, as_of) do update set price = excluded.price, recorded_at = excluded.recorded_at
    """
)

_apply = text(
    """
    insert into dovecote.latest_prices as latest (symbol, price, as_of, position, quotes_applied)
    select * from unnest(cast(:symbols as text[]), cast(:prices as numeric[]), cast(:times as timestamptz[]),
                         cast(:positions as bigint[]), cast(:counts as bigint[]))
        as newest (symbol, price, as_of, position, quotes_applied)
    order by symbol
    on conflict (symbol) do update set
        quotes_applied = latest.quotes_applied + excluded.quotes_applied,
        price = case when (excluded.as_of, excluded.position) > (latest.as_of, latest.position)
                     then excluded.price else latest.price end,
        position = case when (excluded.as_of, excluded.position) > (latest.as_of, latest.position)
                        then excluded.position else latest.position end,
        as_of = greatest(excluded.as_of, latest.as_of)
    """
)


class Prices:
    """Quotes and the latest price of each symbol."""

    def __init__(self, uow: UnitOfWork) -> None:
        self._session = uow.session

    def record(self, quotes: Sequence[Quote]) -> None:
        """Keep these quotes; a later one for the same symbol and time replaces the earlier."""
        last_word = {(quote.symbol, quote.as_of): quote for quote in quotes}.values()
        self._session.execute(
            _record,
            {
                "symbols": [quote.symbol for quote in last_word],
                "times": [quote.as_of for quote in last_word],
                "prices": [quote.price for quote in last_word],
            },
        )

    def apply(self, quotes: Sequence[tuple[int, PriceQuoted]]) -> None:
        """Bring the latest prices up to these quotes, given with their outbox positions.

        A quote older than the stored price changes nothing but the count.
        """
        newest: dict[str, tuple[datetime, int, PriceQuoted]] = {}
        counts: dict[str, int] = {}
        for position, quote in quotes:
            symbol, known = quote.symbol, newest.get(quote.symbol)
            counts[symbol] = counts.get(symbol, 0) + 1
            if known is None or (quote.as_of, position) > known[:2]:
                newest[symbol] = (quote.as_of, position, quote)
        self._session.execute(
            _apply,
            {
                "symbols": array(newest),
                "prices": array(quote.price for _, _, quote in newest.values()),
                "times": array(as_of for as_of, _, _ in newest.values()),
                "positions": array(position for _, position, _ in newest.values()),
                "counts": array(counts[symbol] for symbol in newest),
            },
        )

    def latest(self, symbol: str) -> Price | None:
        """Return the latest price, or None for a symbol never quoted."""
        columns = latest_prices.c
        row = self._session.execute(
            select(columns.symbol, columns.price, columns.as_of, columns.quotes_applied).where(columns.symbol == symbol)
        ).one_or_none()
        return Price(**row._mapping) if row else None

    def history(self, symbol: str, since: datetime, until: datetime) -> list[Quote]:
        """Return the quotes with `since <= as_of < until`, oldest first."""
        columns = price_quotes.c
        rows = self._session.execute(
            select(columns.symbol, columns.price, columns.as_of)
            .where(columns.symbol == symbol, columns.as_of >= since, columns.as_of < until)
            .order_by(columns.as_of)
        )
        return [Quote(**row._mapping) for row in rows]
