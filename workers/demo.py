"""Write mixed events of the three slices and wait until each is an effect, once."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count, islice
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, text

from domain import billing, pricing, verification
from dovecote.database import Sessions
from dovecote.events.ids import uuid7
from dovecote.events.money import Money
from dovecote.privacy import Keyring
from dovecote.store.connections import sessions_for
from dovecote.unit_of_work import UnitOfWork, unit_of_work

_PER_TRANSACTION = 20
_NUMBERS = 100

# A demonstration asks again and again for the codes of a hundred numbers that reach nobody.
_WIDE = verification.Allowance(pause=timedelta(0), codes_an_hour=10_000, codes_a_day=10_000, answers_an_hour=10_000)
_LIMITS = verification.Limits(phone=_WIDE, user=_WIDE)

UseCase = Callable[[UnitOfWork, datetime], None]


@dataclass(frozen=True)
class Report:
    """What became of the events.

    processed   events a handler has acted on
    lost        events that are, after the wait, neither processed nor known as retrying, waiting or dead
    duplicated  effects beyond one per event
    """

    written: int
    published: int
    processed: int
    lost: int
    duplicated: int
    seconds: float

    @property
    def is_sound(self) -> bool:
        return self.lost == 0 and self.duplicated == 0 and self.processed == self.written

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run(
    engine: Engine,
    keys: Keyring,
    events: int,
    *,
    timeout_seconds: float,
    progress: Callable[[int, int], None] = lambda _written, _processed: None,
) -> Report:
    """Write `events` events and wait until all are effects, at most `timeout_seconds`."""
    sessions = sessions_for(engine)
    run_id = uuid7()
    began = time.monotonic()
    after = _last_position(engine)
    written = 0
    use_cases = _use_cases(run_id, keys, random.Random(run_id.int))
    while written < events:
        written += _write(sessions, run_id, list(islice(use_cases, min(_PER_TRANSACTION, events - written))))
        progress(written, 0)
    deadline = time.monotonic() + timeout_seconds
    while (processed := _count(engine, _PROCESSED, run_id, after)) < written and time.monotonic() < deadline:
        progress(written, processed)
        time.sleep(0.05)  # the database is polled: it has no notification for this
    progress(written, processed)
    return Report(
        written=written,
        published=_count(engine, _PUBLISHED, run_id, after),
        processed=processed,
        lost=max(0, written - processed - _count(engine, _ON_THEIR_WAY, run_id, after)),
        # Fewer effects than events is what `lost` says already.
        duplicated=max(0, _count(engine, _EFFECTS, run_id, after) - _count(engine, _EVENTS_WITH_EFFECT, run_id, after)),
        seconds=round(time.monotonic() - began, 3),
    )


def _write(sessions: Sessions, run_id: UUID, use_cases: list[UseCase]) -> int:
    with unit_of_work(sessions, headers={"correlation_id": str(run_id)}) as uow:
        for use_case in use_cases:
            use_case(uow, datetime.now(UTC))
    return len(use_cases)


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


_OURS = """
    from dovecote.outbox o
    where o.position > :after and o.headers ->> 'correlation_id' = cast(:run_id as text)
"""
_PUBLISHED = f"""
    select count(*) {_OURS}
      and exists (select from dovecote.published_batches b where b.positions @> o.position)
"""  # noqa: S608 - put together from constants
_PROCESSED = f"""
    select count(*) {_OURS} and exists (select from dovecote.processed_events p where p.event_id = o.id)
"""  # noqa: S608
_ON_THEIR_WAY = f"""
    select count(*) {_OURS} and exists (select from dovecote.deliveries d where d.event_id = o.id)
"""  # noqa: S608
_EVENTS_WITH_EFFECT = f"select count(*) {_OURS} and o.event_type ~ '^(billing|pricing)[.]'"
# What the ledgers say: one history line for each billing event, one count for each quote.
_EFFECTS = """
    select (select count(*) from dovecote.billing_history h where h.user_id = 'demo-' || :run_id)
         + (select coalesce(sum(l.quotes_applied), 0) from dovecote.latest_prices l
            where l.symbol in (select 'DEMO-' || :run_id || '-' || n from generate_series(0, 4) n))
"""


def _count(engine: Engine, query: str, run_id: UUID, after: int) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(query), {"run_id": str(run_id), "after": after}).scalar_one() or 0)


def _last_position(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("select last_position from dovecote.low_watermark()")).scalar_one())
