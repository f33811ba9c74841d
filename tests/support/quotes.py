"""Builders for tests that need some event, whichever: quotes, whose symbol is their aggregate."""

from datetime import UTC, datetime
from decimal import Decimal

from domain import pricing

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def a_quote(symbol: str = "EUR", price: int = 1) -> pricing.PriceQuoted:
    return pricing.PriceQuoted(occurred_at=NOON, symbol=symbol, price=Decimal(price), as_of=NOON)
