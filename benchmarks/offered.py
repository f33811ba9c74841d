"""Writers that offer a given load, whatever becomes of it, and note when each event was committed.

Up to a thousand events a second each is a transaction of its own, at random (Poisson) times. Above that
a thousand transactions a second carry several events each: with one event each the writers would be what
is measured.
"""

import random
import threading
import time
from dataclasses import dataclass
from uuid import UUID

import psycopg

from dovecote.events.ids import uuid7

_CONNECTIONS = 4
_TRANSACTIONS_PER_SECOND = 1_000

DOMAIN_ROW = "insert into dovecote.price_quotes (symbol, as_of, price) values (%s, clock_timestamp(), 1)"
#: The events of one transaction, to be inserted into one table or another: id, symbol, and a payload of 300 bytes.
EVENTS = """
    from (select id, symbol, '00-' || md5(id::text) || '-b7ad6b7169203331-00' as traceparent,
                 rpad(format('{"as_of": "2026-01-01T00:00:00+00:00", "price": "1.25", "symbol": "%%s", '
                             '"occurred_at": "2026-01-01T00:00:00+00:00", "remark": "', symbol), 298, 'x')
                 || '"}' as payload
          from unnest(%s::uuid[]) id
          cross join lateral (select 's' || ('x' || right(id::text, 4))::bit(16)::int %% 1000 as symbol) s) e
"""
OUTBOX = f"""
    insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers)
    select id, 'price', symbol, 'pricing.price_quoted.v1', payload::jsonb,
           jsonb_build_object('traceparent', traceparent) {EVENTS}
"""


@dataclass
class Offered:
    """What was written: each event's commit in Unix nanoseconds, and how long it took to write all of it."""

    committed: dict[UUID, int]
    seconds: float

    @property
    def per_second(self) -> float:
        return len(self.committed) / self.seconds


def offer(url: str, rate: float, seconds: float, insert: str = OUTBOX) -> Offered:
    """Write events for so many seconds, `rate` a second if the database takes them."""
    events_each = max(1, round(rate / _TRANSACTIONS_PER_SECOND))
    committed: list[dict[UUID, int]] = [{} for _ in range(_CONNECTIONS)]
    threads = [
        threading.Thread(
            target=_writer, args=(url, insert, rate / events_each / _CONNECTIONS, seconds, events_each, n, to)
        )
        for n, to in enumerate(committed)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = max(seconds, time.monotonic() - began)
    return Offered({id: at for part in committed for id, at in part.items()}, took)


def _writer(
    url: str, insert: str, rate: float, seconds: float, events_each: int, number: int, committed: dict[UUID, int]
) -> None:
    arrivals = random.Random(number)
    with psycopg.connect(url, prepare_threshold=1) as connection:
        started = due = time.monotonic()
        while (due := due + arrivals.expovariate(rate)) < started + seconds:
            # The offered rate itself: nothing is awaited.
            time.sleep(max(0.0, due - time.monotonic()))
            ids = [uuid7() for _ in range(events_each)]
            with connection.transaction():
                connection.execute(DOMAIN_ROW, (f"w{number}",))
                connection.execute(insert, (ids,))
            at = time.time_ns()
            for id in ids:
                committed[id] = at
