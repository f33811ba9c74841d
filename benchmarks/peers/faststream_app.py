"""faststream-outbox: python -m benchmarks.peers.faststream_app relay|inplace

`relay` publishes each row to a Redis list with FastStream's decorator; `inplace` acts on the rows itself, which
its documentation calls a standalone outbox queue: no hop, and the quickest way to effects.
"""

import asyncio
import os
import sys
import time
from typing import Any

import asyncpg
from faststream import FastStream
from faststream.redis import RedisBroker
from faststream_outbox import OutboxBroker, make_outbox_table
from sqlalchemy import MetaData, make_url
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.naive import APPLY_POSITIONAL
from benchmarks.probe import note

_WORKERS = 16
_OPTIONS: dict[str, Any] = {
    "max_workers": _WORKERS,
    "fetch_batch_size": 500,
    "min_fetch_interval": 0.01,
    "max_fetch_interval": 1.0,
    "terminal_flush_batch_size": 100,
}


async def main(what: str) -> None:
    url = os.environ["DATABASE_URL"]
    engine = create_async_engine(
        make_url(url).set(drivername="postgresql+asyncpg"),
        pool_size=_WORKERS + 4,
        connect_args={"server_settings": {"application_name": "faststream-outbox"}},
    )
    broker = OutboxBroker(engine, outbox_table=make_outbox_table(MetaData(), table_name="faststream_rows"))
    if what == "relay":
        queues = RedisBroker(os.environ["REDIS_URL"])
        publisher = queues.publisher(list=f"{os.environ['DOVECOTE_REDIS__NAMESPACE']}:quotes")

        @publisher
        @broker.subscriber("quotes", **_OPTIONS)
        async def relay(body: dict[str, Any]) -> dict[str, Any]:
            return body

        await FastStream(broker, on_startup=[queues.connect]).run()
    else:
        pool = await asyncpg.create_pool(url, min_size=_WORKERS, max_size=_WORKERS)

        @broker.subscriber("quotes", **_OPTIONS)
        async def apply(body: dict[str, Any]) -> None:
            reached = time.time_ns()
            data = body["data"]
            await pool.execute(APPLY_POSITIONAL, data["symbol"], data["price"], data["as_of"])
            note(body["event_id"], reached)

        await FastStream(broker).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
