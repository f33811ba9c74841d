"""The thread that fetches from one queue, and what becomes of a message when a worker has done with it.

It waits on the queue itself and takes what comes at once. A message is acknowledged, handed back, or put aside: whoever
worked on it marks it, and it is this thread's consumer that Dramatiq tells.
"""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import _RedisConsumer
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message

from workers.redis_client import PASSING
from workers.route_rules import InvalidRoute

if TYPE_CHECKING:
    from workers.broker import OutboxBroker


class BlockingConsumer(_RedisConsumer):
    """Fetches for Dramatiq's consumer thread; other threads acknowledge."""

    broker: "OutboxBroker"

    def __init__(self, broker: "OutboxBroker", queue_name: str, prefetch: int, timeout: int) -> None:
        super().__init__(broker, queue_name, prefetch, timeout)
        self._room = threading.Event()
        self.message_cache: list[Message[Any]] = []
        self._reclaim_first = True
        self._unfinished: list[str] = []

    def __next__(self) -> MessageProxy | None:
        self.broker.meters.fetching(self.queue_name)
        try:
            if self._reclaim_first:
                self.broker.reclaim(self.queue_name)
                self._reclaim_first = False
            if not self.message_cache:
                self._refill()
            if not self.message_cache:
                return None
            message = self.message_cache.pop(0)
            self.queued_message_ids.add(message.message_id)
            return MessageProxy(message)
        except PASSING as error:
            raise ConnectionClosed(error) from None

    def _refill(self) -> None:
        self._room.clear()
        room = self.prefetch - self.outstanding_message_count
        if room <= 0:
            self._room.wait(self.timeout / 1_000)
            self.broker.beat(self.queue_name)
            return
        self._fetch(room)

    def _fetch(self, room: int) -> None:
        wait_seconds = min(self.timeout, self.broker.idle_wait_ms) / 1_000
        fetched = self.broker.await_and_fetch(self.queue_name, room, wait_seconds)
        unreadable = False
        for data in fetched:
            try:
                # None: the message was acknowledged by a worker that had been taken for dead.
                if data is not None:
                    message: Message[Any] = Message.decode(data)
                    if self.broker.stand_in and message.actor_name not in self.broker.actors:
                        self.broker.stand_in(message.actor_name, self.queue_name)
                    self.message_cache.append(message)
            except (DecodeError, InvalidRoute) as error:  # no relay of ours sends to a handler of such a name
                unreadable = True
                self.logger.error("A message on queue %r cannot be read: %s", self.queue_name, error)
        self.broker.take(self.queue_name, [message.options["redis_message_id"] for message in self.message_cache])
        if unreadable:
            self.broker.bury_unreadable(self.queue_name)

    def ack(self, message: MessageProxy) -> None:
        if is_put_aside(message):
            self._finish(message, lambda queue, ids: self.broker.put_aside(queue, message.actor_name, ids))
        elif not is_handed_back(message):
            self._finish(message, self._ack)
        elif self.broker.stopping:
            # Others that were fetched later go back too; all of them together, or their order is lost.
            self._unfinished.append(message.options["redis_message_id"])
        else:
            self._finish(message, self.broker.hand_back)

    def nack(self, message: MessageProxy) -> None:
        self._finish(message, lambda queue, ids: self.broker.do_nack(queue, *ids))

    def _ack(self, queue: str, ids: list[str]) -> None:
        self.broker.do_ack(queue, *ids)

    def _finish(self, message: MessageProxy, how: Any) -> None:
        id = message.options["redis_message_id"]
        try:
            how(self.queue_name, [id])
            self.broker.let_go(self.queue_name, [id])
        except PASSING as error:
            raise ConnectionClosed(error) from None
        finally:
            self.queued_message_ids.discard(message.message_id)
            self._room.set()

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        self._unfinished += [message.options["redis_message_id"] for message in messages]
        if not self.broker.stopping:
            self._give_back()

    def close(self) -> None:
        # What was fetched but not yet handed to a thread would otherwise wait for our heartbeat to end.
        self._unfinished += [message.options["redis_message_id"] for message in self.message_cache]
        if self.broker.stopping:
            # So would what a thread did not finish in time. It dies with the process, and its transaction with it.
            self._unfinished += self.broker.in_hand(self.queue_name)
        self.message_cache = []
        self._give_back()

    def _give_back(self) -> None:
        ids, self._unfinished = self._unfinished, []
        try:
            self.broker.hand_back(self.queue_name, ids)
        except PASSING as error:
            # Not ours any more: the next consumer reclaims them.
            self.broker.let_go(self.queue_name, ids)
            raise ConnectionClosed(error) from None


def hand_back(message: MessageProxy) -> None:
    """Mark a message that could not be handled: it goes back to its queue instead of being acknowledged."""
    message.__dict__["hand_back"] = True


def is_handed_back(message: MessageProxy) -> bool:
    return message.__dict__.get("hand_back", False) is True


def put_aside(message: MessageProxy) -> None:
    """Mark a message whose handler is paused: it is put aside instead of being acknowledged."""
    message.__dict__["put_aside"] = True


def is_put_aside(message: MessageProxy) -> bool:
    return message.__dict__.get("put_aside", False) is True
