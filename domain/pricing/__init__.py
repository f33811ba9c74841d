"""What things cost: every quote that came in, and the latest price of each symbol."""

from domain.pricing.events import PriceQuoted
from domain.pricing.price import Price, Quote
from domain.pricing.repository import Prices
from domain.pricing.service import apply_quotes, record_quotes

__all__ = ["Price", "PriceQuoted", "Prices", "Quote", "apply_quotes", "record_quotes"]
