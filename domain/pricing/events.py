"""The events of pricing."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from dovecote.events import Event


@dataclass(frozen=True, kw_only=True)
class PriceQuoted(Event, type="pricing.price_quoted.v1", aggregate="price", key="symbol"):
    """A source quoted this price for the time `as_of`; `occurred_at` is when we took it in."""

    symbol: str
    price: Decimal
    as_of: datetime
