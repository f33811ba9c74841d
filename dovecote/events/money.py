"""Money: whole minor units and a currency, never a float."""

import re
from dataclasses import dataclass

from dovecote.errors import InvalidValue, shown

_CURRENCY = re.compile(r"[A-Z]{3}")


@dataclass(frozen=True, slots=True)
class Money:
    """An amount in the currency's minor unit: Money(1999, "EUR") is 19.99 euros.

    Source:  ISO 4217 for the code; how many minor units make a major one depends on the currency.
    Errors:  InvalidValue for a currency that is not three capital letters or an amount that is not whole.
    """

    amount_minor: int
    currency: str

    def __post_init__(self) -> None:
        if type(self.amount_minor) is not int:
            raise InvalidValue(f"an amount is a whole number of minor units, got {shown(self.amount_minor)}")
        if not isinstance(self.currency, str) or not _CURRENCY.fullmatch(self.currency):
            raise InvalidValue(f"a currency is three capital letters such as EUR, got {shown(self.currency)}")

    def __neg__(self) -> "Money":
        return Money(-self.amount_minor, self.currency)

    def __str__(self) -> str:
        return f"{shown(self.amount_minor)} {self.currency} minor units"
