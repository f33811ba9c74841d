"""The fetcher of one queue, and what becomes of a message when a worker is done with it.

It blocks on the queue itself and fetches what comes at once. A message is acknowledged, requeued, held or refused:
a flag on it says which, and Dramatiq calls this consumer. A message for a handler of ours goes to it as it is: nothing
here parses what an intruder may have written.
"""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dramatiq.broker import MessageProxy
from dramatiq.brokers.redis import _RedisConsumer
from dramatiq.common import q_name
from dramatiq.errors import ConnectionClosed, DecodeError
from dramatiq.message import Message
from redis import RedisError

from dovecote.envelope import handler_named_in
from dovecote.envelope.message_reader import Received, RefusedMessage

if TYPE_CHECKING:
    from dovecote.broker.broker import Fetched, OutboxBroker


class Fetcher(_RedisConsumer):
    """Fetches for Dramatiq's consumer thread; other threads acknowledge."""

    broker: "OutboxBroker"

    def __init__(self, broker: "OutboxBroker", queue_name: str, prefetch: int, timeout: int) -> None:
        super().__init__(broker, queue_name, prefetch, timeout)
        self._room = threading.Event()
        self.message_cache: list[Message[Any]] = []
        self._reclaim_first = True
        self._unfinished: list[str] = []

    def __next__(self) -> MessageProxy | None:
        self.broker.instrumentation.fetching(self.queue_name)
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
        except RedisError as error:
            raise ConnectionClosed(error) from None

    def _refill(self) -> None:
        self._room.clear()
        room = self.prefetch - self.outstanding_message_count
        if room <= 0:
            self._room.wait(self.timeout / 1_000)
            self.broker.heartbeat(self.queue_name)
            return
        self._fetch(room)

    def _fetch(self, room: int) -> None:
        wait_seconds = min(self.timeout, self.broker.poll_interval_ms) / 1_000
        fetched = self.broker.await_and_fetch(self.queue_name, room, wait_seconds)
        for one in fetched:
            try:
                self.message_cache.append(self._message(one))
            except RefusedMessage as refused:
                self.broker.refuse(self.queue_name, one.id, refused)
        self.broker.take(self.queue_name, [message.message_id for message in self.message_cache])

    def _message(self, fetched: "Fetched") -> Message[Any]:
        """Return what Dramatiq is given: for a handler of ours the bytes as they are, for others what they say.

        Errors: RefusedMessage.
        """
        if fetched.data is None:
            raise RefusedMessage("too_large", f"it has {fetched.size} bytes, and no message has so many")
        id = fetched.id.decode("ascii", "replace")
        if id.encode() != fetched.id:
            raise RefusedMessage("unreadable", "no message has such an id")
        name = handler_named_in(fetched.data)
        if name is not None and (actor := self.broker.actor_for(q_name(self.queue_name), name)) is not None:
            received = Received(self.queue_name, id, fetched.data, fetched.crashes)
            return Message(self.queue_name, actor, (received,), {}, {"redis_message_id": id}, id, 0)
        try:
            message: Message[Any] = Message.decode(fetched.data)
        except DecodeError as error:
            raise RefusedMessage("unreadable", str(error)[:300]) from None
        if self.broker.is_signed_for(q_name(self.queue_name), message.actor_name):
            raise RefusedMessage("unsigned", "it is not as a relay of this version makes them")
        if message.queue_name != self.queue_name or message.options["redis_message_id"] != id:
            # Dramatiq would look for a queue of that name, and acknowledge a message of that id.
            raise RefusedMessage("misplaced", f"it says it is of queue {message.queue_name[:80]!r}, or of another id")
        return message

    def ack(self, message: MessageProxy) -> None:
        if (refused := refusal_of(message)) is not None:
            self._finish(message, lambda queue, ids: self.broker.refuse(queue, ids[0].encode(), refused))
        elif is_to_hold(message):
            self._finish(message, lambda queue, ids: self.broker.hold(queue, message.actor_name, ids))
        elif not is_to_requeue(message):
            self._finish(message, self._ack)
        elif self.broker.stopping:
            # Those fetched later are requeued too: all together, or their order is lost.
            self._unfinished.append(message.options["redis_message_id"])
        else:
            self._finish(message, self.broker.requeue)

    def nack(self, message: MessageProxy) -> None:
        self._finish(message, lambda queue, ids: self.broker.do_nack(queue, *ids))

    def _ack(self, queue: str, ids: list[str]) -> None:
        self.broker.do_ack(queue, *ids)

    def _finish(self, message: MessageProxy, how: Any) -> None:
        id = message.options["redis_message_id"]
        try:
            how(self.queue_name, [id])
            self.broker.release(self.queue_name, [id])
        except RedisError as error:
            raise ConnectionClosed(error) from None
        finally:
            self.queued_message_ids.discard(message.message_id)
            self._room.set()

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        self._unfinished += [message.options["redis_message_id"] for message in messages]
        if not self.broker.stopping:
            self._requeue_unfinished()

    def close(self) -> None:
        # What was fetched but not yet given to a thread would otherwise wait until our heartbeat times out.
        self._unfinished += [message.options["redis_message_id"] for message in self.message_cache]
        if self.broker.stopping:
            # So would what a thread did not finish in time. The thread ends with the process, and its transaction too.
            self._unfinished += self.broker.in_hand(self.queue_name)
        self.message_cache = []
        self._requeue_unfinished()

    def _requeue_unfinished(self) -> None:
        ids, self._unfinished = self._unfinished, []
        try:
            self.broker.requeue(self.queue_name, ids)
        except RedisError as error:
            # They are not ours any more: the next consumer reclaims them.
            self.broker.release(self.queue_name, ids)
            raise ConnectionClosed(error) from None


def set_to_requeue(message: MessageProxy) -> None:
    """Have a message that could not be handled requeued instead of acknowledged."""
    message.__dict__["requeue"] = True


def is_to_requeue(message: MessageProxy) -> bool:
    return message.__dict__.get("requeue", False) is True


def set_to_hold(message: MessageProxy) -> None:
    """Have a message whose handler is paused held instead of acknowledged."""
    message.__dict__["hold"] = True


def is_to_hold(message: MessageProxy) -> bool:
    return message.__dict__.get("hold", False) is True


def set_to_refuse(message: MessageProxy, refused: RefusedMessage) -> None:
    """Have a message dead-lettered that no handler may act on."""
    message.__dict__["refused"] = refused


def refusal_of(message: MessageProxy) -> RefusedMessage | None:
    """Return why the message is refused; None where it is not."""
    refused = message.__dict__.get("refused")
    return refused if isinstance(refused, RefusedMessage) else None
