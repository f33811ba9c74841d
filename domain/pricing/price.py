"""A quote as it comes in, and the latest price it may become."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from domain.pricing.events import PriceQuoted
from dovecote.errors import InvalidValue, shown

MAX_SYMBOL_CHARACTERS = 100
# The column is numeric(38, 18): beyond it Postgres would refuse or round.
_MAX_WHOLE_DIGITS = 20
_MAX_DECIMALS = 18


def check_quote(symbol: str, price: Decimal, as_of: datetime) -> None:
    """Refuse what no source can mean: see `Quote`."""
    if not 1 <= len(symbol) <= MAX_SYMBOL_CHARACTERS or not symbol.isprintable():
        raise InvalidValue(f"a symbol has 1 to {MAX_SYMBOL_CHARACTERS} printable characters, got {shown(symbol, 40)}")
    if not price.is_finite() or price <= 0:
        raise InvalidValue(f"a price is a positive number, got {shown(price)}")
    exponent = price.as_tuple().exponent
    assert isinstance(exponent, int), "a finite decimal has a number for exponent"
    if price.adjusted() >= _MAX_WHOLE_DIGITS or -exponent > _MAX_DECIMALS:
        raise InvalidValue(
            f"a price has at most {_MAX_WHOLE_DIGITS} digits and {_MAX_DECIMALS} decimals, got {shown(price)}"
        )
    if as_of.tzinfo is None:
        raise InvalidValue(f"a time needs a time zone, got {as_of}")


@dataclass(frozen=True, kw_only=True)
class Quote:
    """What a symbol costs at a time, as a source reports it.

    Errors: InvalidValue for a symbol that is empty, longer than 100 characters or not printable; for a
            price that is not a positive number of at most 20 digits and 18 decimals; for a time
            without a time zone.
    """

    symbol: str
    price: Decimal
    as_of: datetime

    def __post_init__(self) -> None:
        check_quote(self.symbol, self.price, self.as_of)

    def to_event(self, at: datetime) -> PriceQuoted:
        """Return the event that records this quote."""
        return PriceQuoted(symbol=self.symbol, price=self.price, as_of=self.as_of, occurred_at=at)


@dataclass(frozen=True, kw_only=True)
class Price:
    """The latest price of a symbol; `quotes_applied` counts every quote seen, older ones included."""

    symbol: str
    price: Decimal
    as_of: datetime
    quotes_applied: int
