"""Handlers of the events of pricing."""

from collections.abc import Sequence

from domain import pricing
from domain.pricing import PriceQuoted
from dovecote.envelope import Envelope
from dovecote.unit_of_work import UnitOfWork
from workers.gateways import Gateways


def apply_quotes(envelopes: Sequence[Envelope], uow: UnitOfWork, _gateways: Gateways) -> None:
    """A quoted price becomes the latest of its symbol, unless a newer one is known."""
    pricing.apply_quotes(
        uow,
        [(envelope.position, event) for envelope in envelopes if isinstance(event := envelope.event, PriceQuoted)],
    )
