"""Handlers of the events of billing."""

from domain.billing import BillingEvent, History, line_for
from dovecote.unit_of_work import UnitOfWork
from workers.gateways import Gateways


def write_history(event: BillingEvent, uow: UnitOfWork, _gateways: Gateways) -> None:
    """Whatever happens to a membership is one line of its history, even in a forced replay."""
    History(uow).write(line_for(event))
