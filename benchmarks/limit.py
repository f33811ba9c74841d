"""What the machine can do: the same bytes read with COPY and written with pipelined HSET and RPUSH.

Nothing in between: no routes, no order, nothing recorded; it would lose events at the first crash. The
bytes are those the relay writes, five hundred events a message. One process, like a relay.
"""

import time

from benchmarks.harness import Scene

ENVELOPES = "copy (select dovecote.envelope(o) from dovecote.outbox o) to stdout"
#: Stricter still: the rows as they are, which no queue of CloudEvents could be served with.
ROWS = "copy (select * from dovecote.outbox) to stdout"
_ROWS_A_MESSAGE = 500
_MESSAGES_A_PIPELINE = 4


def run(scene: Scene, query: str = ENVELOPES) -> float:
    """Carry the whole outbox over once; return the seconds it took."""
    queue = f"{scene.namespace}:limit"
    started = time.perf_counter()
    pipeline = scene.client.pipeline(transaction=False)
    rows: list[bytes] = []
    messages = 0

    def put() -> None:
        nonlocal messages
        id = f"b{messages:032x}"
        pipeline.hset(f"{queue}.msgs", id, b"".join(rows))
        pipeline.rpush(queue, id)
        rows.clear()
        messages += 1
        if messages % _MESSAGES_A_PIPELINE == 0:
            pipeline.execute()

    with scene.connection.cursor().copy(query) as copy:
        for row in copy:
            rows.append(bytes(row))
            if len(rows) == _ROWS_A_MESSAGE:
                put()
    if rows:
        put()
    pipeline.execute()
    return time.perf_counter() - started
