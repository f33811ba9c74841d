"""What a worker cannot finish goes back to its queue, or is put aside."""

import threading
from collections import OrderedDict
from typing import Any

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware

from dovecote.broker.broker import OutboxBroker
from dovecote.broker.fetcher import hand_back, put_aside, refuse
from dovecote.consumer.retrying import Stopping
from dovecote.envelope.message_reader import RefusedMessage
from dovecote.store.pauses import HandlerPaused

# By one process. With a pause of a second each, that is a while for a bug of the moment to pass.
_MAX_HAND_BACKS = 20
_MAX_REMEMBERED = 10_000


class HandBackWhatFails(Middleware):
    """An actor that raises has not done its work: its message is handed back, never acknowledged.

    Handlers' failures never come this far (consumer.py records them). What does is a handler that is paused,
    a process that is told to stop while it waits, or a bug. A bug is slowed down, not spun on, and a message that meets
    it time after time is refused: the relay sends its events again when they have been missing for long.
    """

    @property
    def actor_options(self) -> set[str]:
        # Dramatiq's worker logs what an actor is said to throw in one line instead of a traceback.
        return {"throws"}

    def __init__(self, pause_seconds: float = 1.0) -> None:
        self._pause_seconds = pause_seconds
        # How often a message was handed back for a bug, the last ones only.
        self._handed_back: OrderedDict[str, int] = OrderedDict()
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
            put_aside(message)
        elif exception is not None:
            self._stopping.wait(self._pause_seconds)
            if isinstance(exception, Stopping) or self._may_come_again(message.message_id):
                hand_back(message)
            else:
                what = f"{type(exception).__name__}: {exception}".partition("\n")[0][:200]
                refuse(message, RefusedMessage("failed", f"it was requeued {_MAX_HAND_BACKS} times, and again: {what}"))

    def _may_come_again(self, message_id: str) -> bool:
        with self._lock:
            times = self._handed_back.pop(message_id, 0) + 1
            if times > _MAX_HAND_BACKS:
                return False
            self._handed_back[message_id] = times
            if len(self._handed_back) > _MAX_REMEMBERED:
                self._handed_back.popitem(last=False)
        return True
