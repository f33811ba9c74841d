"""The events that benchmarks are about: a payload of 300 bytes and tracing headers.

Price quotes, which a handler takes by the bundle, and payments, which an ordinary handler takes one by one.
"""

import time
from dataclasses import dataclass

from benchmarks.scene import Scene

SYMBOLS = 1_000
PAYLOAD_BYTES = 300

# As production writes them: every transaction has its own trace, one in a hundred is sampled.
_TRACE = """format('{"traceparent": "00-%%s-%%s-%%s"}', md5(n::text), left(md5((n + 7)::text), 16),
                  case when n %% 100 = 0 then '01' else '00' end)"""


def _events(aggregate_type: str, aggregate_id: str, event_type: str, payload: str, end: str) -> str:
    """Return SQL for %s events; `payload` is SQL for JSON whose last text and braces are still open."""
    return f"""
        select '{aggregate_type}' as aggregate_type, id as aggregate_id, '{event_type}' as event_type,
               rpad(payload, {PAYLOAD_BYTES - len(end)}, 'x') || '{end}' as payload, {_TRACE} as headers
        from generate_series(1::bigint, %s::bigint) n
        cross join lateral (select {aggregate_id} as id) i
        cross join lateral (select {payload} as payload) p
    """  # noqa: S608 - our own words


@dataclass(frozen=True)
class Load:
    """Events of one kind: SQL that makes %s of them, the queue they go to, and SQL that counts their effects."""

    queue: str
    events: str
    effects: str


QUOTES = Load(
    queue="pricing",
    events=_events(
        "price",
        f"'s' || n %% {SYMBOLS}",
        "pricing.price_quoted.v1",
        """format('{"as_of": "2026-01-01T00:00:00.%%s+00:00", "price": "%%s.25", "symbol": "%%s", '
                  '"occurred_at": "2026-01-01T00:00:01+00:00", "remark": "', lpad((n %% 1000000)::text, 6, '0'),
                  1 + n %% 900, id)""",
        '"}',
    ),
    effects="select coalesce(sum(quotes_applied), 0) from dovecote.latest_prices",
)
PAYMENTS = Load(
    queue="billing",
    events=_events(
        "membership",
        f"md5((n %% {SYMBOLS})::text)::uuid::text",
        "billing.payment_recorded.v1",
        """format('{"membership_id": "%%s", "user_id": "u%%s", "occurred_at": "2026-01-01T00:00:01+00:00", '
                  '"amount": {"amount_minor": 1999, "currency": "EUR"}, "invoice_id": "in_%%s", "description": "',
                  id, n %% 1000, n)""",
        '"}',
    ),
    effects="select count(*) from dovecote.billing_history",
)

_COLUMNS = "(aggregate_type, aggregate_id, event_type, payload, headers)"


def outbox(scene: Scene, events: int, load: Load = QUOTES, table: str = "dovecote.outbox") -> float:
    """Commit events to an outbox in one transaction; return the time when the commit had returned (Unix)."""
    cast = f"select aggregate_type, aggregate_id, event_type, payload::jsonb, headers::jsonb from ({load.events}) e"  # noqa: S608 - our own words
    scene.connection.execute(f"insert into {table} {_COLUMNS} {cast}", (events,))
    return time.time()


def naive_outbox(scene: Scene, events: int, load: Load = QUOTES) -> float:
    """Commit the same events to the naive outbox."""
    return outbox(scene, events, load, "naive.outbox")
