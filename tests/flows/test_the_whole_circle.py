"""A committed event becomes an effect, exactly once: the three domains through a real relay and real workers."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from domain import billing, pricing, verification
from dovecote.events.money import Money
from dovecote.settings import Settings
from dovecote.unit_of_work import unit_of_work
from tests.support.system import System, system_for
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture
def system(settings: Settings) -> Iterator[System]:
    with system_for(settings, ROUTES) as system, system.running():
        yield system


def test_a_membership_s_events_become_its_history_in_order(system: System) -> None:
    with unit_of_work(system.sessions) as uow:
        membership = billing.start_membership(uow, "user-1", billing.Tier.MONTHLY, NOON)
    with unit_of_work(system.sessions) as uow:
        billing.activate_membership(uow, membership.id, NOON, until=NOON + timedelta(days=30))
        billing.record_payment(uow, membership.id, Money(999, "EUR"), "in_1", "November", NOON)

    system.until_quiet()

    with unit_of_work(system.sessions) as uow:
        lines = billing.History(uow).of(membership.id)
    assert [line.event_type for line in lines] == [
        "billing.membership_started.v1",
        "billing.membership_activated.v1",
        "billing.payment_recorded.v1",
    ]
    assert lines[-1].amount == Money(999, "EUR")


def test_a_thousand_quotes_are_applied_once_each(system: System) -> None:
    for day in range(10):
        with unit_of_work(system.sessions) as uow:
            quotes = [
                pricing.Quote(symbol=f"S{n}", price=Decimal(day + 1), as_of=NOON + timedelta(days=day))
                for n in range(100)
            ]
            pricing.record_quotes(uow, quotes, NOON)

    status = system.until_quiet()

    assert status.handlers["pricing.apply_quotes"].processed == 1_000
    with unit_of_work(system.sessions) as uow:
        latest = [pricing.Prices(uow).latest(f"S{n}") for n in range(100)]
    assert {(price.price, price.quotes_applied) for price in latest if price} == {(Decimal(10), 10)}
    assert None not in latest


def test_a_quote_older_than_the_stored_price_is_ignored_but_counted(system: System) -> None:
    for as_of in (NOON, NOON - timedelta(days=1)):
        with unit_of_work(system.sessions) as uow:
            quote = pricing.Quote(symbol="EUR", price=Decimal(as_of.day), as_of=as_of)
            pricing.record_quotes(uow, [quote], NOON)
        system.until_quiet()

    with unit_of_work(system.sessions) as uow:
        latest = pricing.Prices(uow).latest("EUR")
        history = pricing.Prices(uow).history("EUR", NOON - timedelta(days=2), NOON + timedelta(days=1))
    assert latest
    assert (latest.price, latest.quotes_applied) == (Decimal(20), 2)
    assert [quote.price for quote in history] == [Decimal(19), Decimal(20)]


def test_a_code_reaches_the_phone_and_proves_it(system: System, tmp_path: Path) -> None:
    with unit_of_work(system.sessions) as uow:
        challenge = verification.request_code(uow, system.gateways.keys, "user-1", "+12015550123", datetime.now(UTC))

    system.until_quiet()
    code = _digits_shown_on((tmp_path / "handset.txt").read_text())
    with unit_of_work(system.sessions) as uow:
        verdict = verification.answer_challenge(
            uow, system.gateways.keys, challenge.id, code, datetime.now(UTC), user_id="user-1"
        )

    assert isinstance(verdict, verification.PhoneVerified)
    system.until_quiet()


def test_nothing_of_a_rolled_back_transaction_is_published(system: System) -> None:
    def start_and_fail() -> None:
        with unit_of_work(system.sessions) as uow:
            billing.start_membership(uow, "user-1", billing.Tier.FREE, NOON)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        start_and_fail()

    status = system.until_quiet()

    assert status.relay.published == 0


def _digits_shown_on(screen: str) -> str:
    (code,) = {word.strip(".,") for word in screen.split() if word.strip(".,").isdigit() and len(word.strip(".,")) == 6}
    return code
