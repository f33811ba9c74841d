"""Write mixed events of the three slices and wait until each is an effect, once."""

import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import count
from uuid import UUID

from sqlalchemy import Engine

from domain import billing, pricing, verification
from dovecote.events.ids import uuid7
from dovecote.events.money import Money
from dovecote.local.demonstration import EVENTS_OF_RUN, Demonstration, Progress, Report, UseCase
from dovecote.privacy import Keyring
from dovecote.settings import Settings
from dovecote.unit_of_work import UnitOfWork

_NUMBERS = 100

# A demonstration asks again and again for the codes of a hundred numbers that reach nobody.
_WIDE = verification.Allowance(pause=timedelta(0), codes_an_hour=10_000, codes_a_day=10_000, answers_an_hour=10_000)
_LIMITS = verification.Limits(phone=_WIDE, user=_WIDE)


def run(settings: Settings, engine: Engine, events: int, timeout_seconds: float, progress: Progress) -> Report:
    """Write `events` events and wait until all are effects, at most `timeout_seconds`."""
    demonstration = Demonstration.begin(engine)
    chance = random.Random(demonstration.run_id.int)

    def count_duplicates() -> int:
        # Fewer effects than events is what `lost` reports already.
        return max(0, demonstration.count(_EFFECTS) - demonstration.count(_EVENTS_WITH_EFFECT))

    return demonstration.run(
        _use_cases(demonstration.run_id, settings.keyring(), chance),
        events,
        timeout_seconds=timeout_seconds,
        progress=progress,
        count_duplicates=count_duplicates,
    )


def _use_cases(run_id: UUID, keys: Keyring, chance: random.Random) -> Iterator[UseCase]:
    """Yield use cases of exactly one event each."""
    # In turn, so that two demonstrations lock numbers in the same order.
    for turn in count(chance.randrange(_NUMBERS)):
        yield from _membership(f"demo-{run_id}", chance)
        for _ in range(5):
            yield _quote(f"DEMO-{run_id}-{chance.randrange(5)}", chance)
        yield from _challenge(f"demo-{run_id}", keys, turn)


def _membership(user: str, chance: random.Random) -> Iterator[UseCase]:
    opened: list[UUID] = []
    tier = chance.choice([billing.Tier.MONTHLY, billing.Tier.ANNUAL])

    def start(uow: UnitOfWork, at: datetime) -> None:
        opened.append(billing.start_membership(uow, user, tier, at).id)

    def activate(uow: UnitOfWork, at: datetime) -> None:
        billing.activate_membership(uow, opened[0], at, until=at + timedelta(days=30))

    def pay(uow: UnitOfWork, at: datetime) -> None:
        amount = Money(chance.randrange(100, 10_000), "EUR")
        billing.record_payment(uow, opened[0], amount, f"in_{uuid7().hex}", "demo", at)

    yield from (start, activate, pay)


def _quote(symbol: str, chance: random.Random) -> UseCase:
    def quote(uow: UnitOfWork, at: datetime) -> None:
        price = Decimal(chance.randrange(1, 1_000_000)) / 100
        pricing.record_quotes(uow, [pricing.Quote(symbol=symbol, price=price, as_of=at)], at)

    return quote


def _challenge(user: str, keys: Keyring, turn: int) -> Iterator[UseCase]:
    issued: list[UUID] = []
    user_id = f"{user}-{uuid7()}"
    # 555-0100 to 555-0199 are kept for fiction: no message can reach anybody (NANPA).
    phone = f"+12015550{100 + turn % _NUMBERS}"

    def request(uow: UnitOfWork, at: datetime) -> None:
        issued.append(verification.request_code(uow, keys, user_id, phone, at, limits=_LIMITS).id)

    def answer_wrongly(uow: UnitOfWork, at: datetime) -> None:
        verification.answer_challenge(uow, keys, issued[0], "000000", at, user_id=user_id, limits=_LIMITS)

    yield from (request, answer_wrongly)


_EVENTS_WITH_EFFECT = f"select count(*) {EVENTS_OF_RUN} and o.event_type ~ '^(billing|pricing)[.]'"
# What the ledgers say: one history line for each billing event, one count for each quote.
_EFFECTS = """
    select (select count(*) from dovecote.billing_history h where h.user_id = 'demo-' || :run_id)
         + (select coalesce(sum(l.quotes_applied), 0) from dovecote.latest_prices l
            where l.symbol in (select 'DEMO-' || :run_id || '-' || n from generate_series(0, 4) n))
"""
