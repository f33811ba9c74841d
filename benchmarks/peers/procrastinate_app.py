"""procrastinate's worker: python -m benchmarks.peers.procrastinate_app

A queue in Postgres: no relay, no broker. Async tasks side by side, woken by LISTEN, done jobs deleted.
"""

import asyncio
import os
import time
from typing import Any

from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool

from benchmarks.naive import APPLY
from benchmarks.probe import note

_CONCURRENCY = 16

url = os.environ["DATABASE_URL"]
named = {"application_name": "procrastinate"}
app = App(connector=PsycopgConnector(conninfo=url, kwargs=named, min_size=4, max_size=_CONCURRENCY + 4))
pool = AsyncConnectionPool(url, min_size=_CONCURRENCY, max_size=_CONCURRENCY, open=False, kwargs={"autocommit": True})


@app.task(queue="quotes", name="apply_quote")
async def apply_quote(event_id: str, data: dict[str, Any]) -> None:
    reached = time.time_ns()
    async with pool.connection() as connection:
        await connection.execute(APPLY, data)
    note(event_id, reached)


async def main() -> None:
    async with pool, app.open_async():
        await app.run_worker_async(
            concurrency=_CONCURRENCY, queues=["quotes"], delete_jobs="always", fetch_job_polling_interval=1.0
        )


if __name__ == "__main__":
    asyncio.run(main())
