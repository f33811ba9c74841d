"""What a worker cannot finish goes back to its queue, or is put aside."""

import threading
from typing import Any

import dramatiq
from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import Middleware

from workers.broker import OutboxBroker
from workers.fetching import hand_back, put_aside
from workers.pauses import HandlerPaused


class HandBackWhatFails(Middleware):
    """An actor that raises has not done its work: its message is handed back, never acknowledged.

    Handlers' failures never come this far (workers/consume.py records them). What does is a handler that is paused,
    a process that is told to stop while it waits, or a bug; a bug is slowed down, not spun on.
    """

    @property
    def actor_options(self) -> set[str]:
        # Dramatiq's worker logs what an actor is said to throw in one line instead of a traceback.
        return {"throws"}

    def __init__(self, pause_seconds: float = 1.0) -> None:
        self._pause_seconds = pause_seconds
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
            hand_back(message)
