"""Dramatiq middleware: a message that a worker cannot finish is requeued, held or refused."""

import threading
from collections import OrderedDict
from typing import Any

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware

from dovecote.broker.broker import OutboxBroker
from dovecote.broker.fetcher import set_to_hold, set_to_refuse, set_to_requeue
from dovecote.consumer.retrying import Stopping
from dovecote.envelope.message_reader import RefusedMessage
from dovecote.store.pauses import HandlerPaused

# By one process. With a pause of a second each, a transient fault has some time to end.
_MAX_REQUEUES = 20
_MAX_REMEMBERED = 10_000


class RequeueWhatFails(Middleware):
    """Requeues the message of an actor that raises, instead of acknowledging it.

    Failures of handlers never come this far (consumer.py records them). What does is a paused handler, a process that
    is asked to stop while it waits, or a bug. A bug is slowed down by a pause, and a message that meets it time after
    time is refused: the relay sends its events again when they have been missing for long.
    """

    @property
    def actor_options(self) -> set[str]:
        # Dramatiq's worker logs an exception that an actor declares in one line instead of a traceback.
        return {"throws"}

    def __init__(self, pause_seconds: float = 1.0) -> None:
        self._pause_seconds = pause_seconds
        # How often each of the last messages was requeued because of a bug.
        self._requeues: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._stopping = threading.Event()

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        self._stopping.clear()
        if isinstance(broker, OutboxBroker):
            broker.stopping = False

    def before_worker_shutdown(self, broker: Broker, worker: dramatiq.Worker) -> None:
        self._stopping.set()
        if isinstance(broker, OutboxBroker):
            broker.stopping = True

    def after_process_message(
        self,
        broker: Broker,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        if isinstance(exception, HandlerPaused):
            set_to_hold(message)
        elif exception is not None:
            self._stopping.wait(self._pause_seconds)
            if isinstance(exception, Stopping) or self._may_come_again(message.message_id):
                set_to_requeue(message)
            else:
                what = f"{type(exception).__name__}: {exception}".partition("\n")[0][:200]
                set_to_refuse(message, RefusedMessage("failed", f"requeued {_MAX_REQUEUES} times, and again: {what}"))

    def _may_come_again(self, message_id: str) -> bool:
        with self._lock:
            times = self._requeues.pop(message_id, 0) + 1
            if times > _MAX_REQUEUES:
                return False
            self._requeues[message_id] = times
            if len(self._requeues) > _MAX_REMEMBERED:
                self._requeues.popitem(last=False)
        return True
