"""The events every benchmark is about: price quotes with a payload of 300 bytes and tracing headers."""

import time

from benchmarks.harness import Scene

SYMBOLS = 1_000
PAYLOAD_BYTES = 300

# As production writes them: every transaction has its own trace, one in a hundred is sampled.
_EVENTS = f"""
    select 'price' as aggregate_type, symbol as aggregate_id, 'pricing.price_quoted.v1' as event_type,
           rpad(payload, {PAYLOAD_BYTES} - 2, 'x') || '"}}' as payload,
           format('{{"traceparent": "00-%%s-%%s-%%s"}}', md5(n::text), left(md5((n + 7)::text), 16),
                  case when n %% 100 = 0 then '01' else '00' end) as headers
    from generate_series(1::bigint, %s::bigint) n
    cross join lateral (select 's' || n %% {SYMBOLS} as symbol) s
    cross join lateral (select format(
        '{{"as_of": "2026-01-01T00:00:00.%%s+00:00", "price": "%%s.25", "symbol": "%%s", '
        '"occurred_at": "2026-01-01T00:00:01+00:00", "remark": "', lpad((n %% 1000000)::text, 6, '0'),
        1 + n %% 900, symbol) as payload) p
"""  # noqa: S608 - our own words
_COLUMNS = "(aggregate_type, aggregate_id, event_type, payload, headers)"
_CAST = f"select aggregate_type, aggregate_id, event_type, payload::jsonb, headers::jsonb from ({_EVENTS}) e"  # noqa: S608 - as above


def outbox(scene: Scene, events: int) -> float:
    """Commit events to our outbox in one transaction; return the moment the commit had returned (Unix)."""
    scene.connection.execute(f"insert into dovecote.outbox {_COLUMNS} {_CAST}", (events,))
    return time.time()


def naive_outbox(scene: Scene, events: int) -> float:
    """Commit the same events to the naive outbox."""
    scene.connection.execute(f"insert into naive.outbox {_COLUMNS} {_CAST}", (events,))
    return time.time()
