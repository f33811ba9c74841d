"""txoutbox's relay in front of Dramatiq: python -m benchmarks.peers.txoutbox_relay

Woken by LISTEN, without keys and so without its ordering lock, large rounds. Its publisher is a function for
one message; ours lets those of a round leave in one pipeline, which is the quickest a user could write.
"""

import asyncio
import os
from typing import Any

import dramatiq
import redis.asyncio
from txoutbox import OutboxMessage, Relay, RelayConfig
from txoutbox.adapters.postgres import PostgresStorage

from benchmarks.naive import apply_quote

_ROUND = 1_000


class Publisher:
    """Puts messages on Dramatiq's queue; those that come in one turn of the loop go together."""

    def __init__(self, client: redis.asyncio.Redis, queue: str) -> None:
        self._client = client
        self._queue = queue
        self._waiting: list[tuple[str, bytes]] = []
        self._sent: asyncio.Task[None] | None = None

    async def publish(self, message: OutboxMessage) -> None:
        event = message.json()
        built: dramatiq.Message[Any] = apply_quote.message(event["event_id"], event)
        built = built.copy(options={"redis_message_id": event["event_id"]})
        self._waiting.append((event["event_id"], built.encode()))
        if self._sent is None:
            self._sent = asyncio.create_task(self._send())
        await self._sent

    async def _send(self) -> None:
        await asyncio.sleep(0)
        waiting, self._waiting, self._sent = self._waiting, [], None
        pipeline = self._client.pipeline(transaction=False)
        pipeline.hset(f"{self._queue}.msgs", mapping=dict(waiting))
        pipeline.rpush(self._queue, *(id for id, _ in waiting))
        await pipeline.execute()


async def main() -> None:
    storage = await PostgresStorage.connect(
        os.environ["DATABASE_URL"],
        schema="txoutbox",
        strict_ordering=False,
        notify_channel="txoutbox",
        min_size=2,
        max_size=4,
        server_settings={"application_name": "txoutbox"},
    )
    queue = f"{os.environ['DOVECOTE_REDIS__NAMESPACE']}:pricing"
    publisher = Publisher(redis.asyncio.Redis.from_url(os.environ["REDIS_URL"]), queue)
    relay = Relay(storage, publisher, config=RelayConfig(batch_size=_ROUND, concurrency=_ROUND))
    listener = await storage.listen(relay.wake)
    await relay.run(handle_signals=True)
    await listener.close()
    await storage.close()


if __name__ == "__main__":
    asyncio.run(main())
