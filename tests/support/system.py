"""A whole system inside one test: a real relay and real Dramatiq workers, as threads of the test process.

Tests that kill processes start real ones instead (tests/flows/test_killing.py).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import dramatiq
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from dovecote import operations
from dovecote.bootstrap import broker_for, declare_handlers, relay_for
from dovecote.broker.broker import OutboxBroker
from dovecote.broker.publisher import Publisher
from dovecote.consumer.consumer import Consumer
from dovecote.consumer.middleware import RequeueWhatFails
from dovecote.relay.fence import Claim, RedisFence
from dovecote.relay.relay import Relay
from dovecote.route import Dovecote, Purge, Route, queues
from dovecote.settings import Settings
from dovecote.store.connections import sessions_for
from dovecote.store.engines import engine_for
from dovecote.telemetry.instrumentation import ConsumerInstrumentation, RelayInstrumentation
from tests.support.exact_counts import count_everything
from tests.support.processes import eventually
from workers.gateways import Gateways, gateways_for


@dataclass
class System:
    """Parts a test may look at, stop and start."""

    settings: Settings
    engine: Engine
    sessions: sessionmaker[Session]
    routes: Sequence[Route]
    gateways: Gateways
    broker: OutboxBroker
    consumer: Consumer

    def status(self) -> operations.status.Status:
        return operations.status.get_status(self.engine, self.routes)

    def is_quiet(self) -> bool:
        """Everything committed is published, and acted on or given up."""
        return count_everything(self.engine, self.routes).is_quiet

    def until_quiet(self, within_seconds: float = 20) -> operations.status.Status:
        eventually(self.is_quiet, within_seconds, f"a quiet system; it is {self.status()}")
        return self.status()

    @contextmanager
    def relay(
        self, instrumentation: RelayInstrumentation | None = None, purges: Sequence[Purge] = ()
    ) -> Iterator[Relay]:
        """Run a relay until the end of the block."""
        relay = relay_for(self.settings, Dovecote(routes=self.routes, purges=purges), instrumentation)
        thread = threading.Thread(target=relay.run, name="relay")
        thread.start()
        try:
            yield relay
        finally:
            relay.stop()
            thread.join(20)
            assert not thread.is_alive(), "the relay did not stop"

    @property
    def publisher(self) -> Publisher:
        """What a relay that the test plays publishes with."""
        return publisher_of(self.broker)

    @contextmanager
    def workers(self, threads: int = 4) -> Iterator[dramatiq.Worker]:
        """Run Dramatiq workers for every queue until the end of the block."""
        worker = dramatiq.Worker(
            self.broker, queues=set(queues(self.routes)), worker_threads=threads, worker_timeout=100
        )
        worker.start()
        try:
            yield worker
        finally:
            worker.stop(timeout=20_000)

    @contextmanager
    def running(self) -> Iterator["System"]:
        with self.relay(), self.workers():
            yield self


@contextmanager
def system_for(
    settings: Settings, routes: Sequence[Route], instrumentation: ConsumerInstrumentation | None = None
) -> Iterator[System]:
    """Put a system together; nothing of it runs yet."""
    engine = engine_for(settings, "dovecote test")
    stopping = threading.Event()
    broker = broker_for(settings, [RequeueWhatFails(pause_seconds=0.05)], instrumentation)
    gateways = gateways_for(settings)
    sessions = sessions_for(engine)
    consumer = Consumer(
        sessions,
        gateways,
        stopping,
        outage_max_backoff_seconds=0.1,
        instrumentation=instrumentation,
        keyring=settings.keyring_if_given(),
    )
    declare_handlers(broker, consumer, routes)
    try:
        yield System(settings, engine, sessions, routes, gateways, broker, consumer)
    finally:
        stopping.set()
        for key in broker.client.scan_iter(f"{settings.redis.namespace}:*"):
            broker.client.delete(key)
        engine.dispose()


def claim(publisher: Publisher, epoch: int, over: str = "", history: str = "", **known: int) -> bool:
    """Let an epoch publish without a relay."""
    return RedisFence(publisher).claim(Claim(epoch, history, "1 1 1", heartbeat=5), over=over, **known)


@cache
def publisher_of(broker: OutboxBroker) -> Publisher:
    """The one publisher on the queues of the broker."""
    return Publisher(broker.client, broker.namespace, broker.queues, heartbeat_timeout_ms=broker.heartbeat_timeout)
