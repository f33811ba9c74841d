"""The use cases of pricing."""

from collections.abc import Sequence
from datetime import datetime

from domain.pricing.events import PriceQuoted
from domain.pricing.price import Quote, check_quote
from domain.pricing.repository import Prices
from dovecote.unit_of_work import UnitOfWork


def record_quotes(uow: UnitOfWork, quotes: Sequence[Quote], at: datetime) -> None:
    """Keep what a source quoted, and emit one event for each quote, in the order given."""
    if not quotes:
        return
    Prices(uow).record(quotes)
    for quote in quotes:
        uow.emit(quote.to_event(at))


def apply_quotes(uow: UnitOfWork, quotes: Sequence[tuple[int, PriceQuoted]]) -> None:
    """Move the latest prices on; each quote comes with its outbox position, which breaks ties of the same time.

    Errors: InvalidValue for a quote that cannot be: a writer in another language may emit what Quote refuses.
    """
    for _, quote in quotes:
        check_quote(quote.symbol, quote.price, quote.as_of)
    Prices(uow).apply(quotes)
