"""The composition root: from settings to a relay, to a process of consumers. One call a process.

An application starts its processes with its app object, or has them find it: `dovecote relay` and
`dramatiq dovecote.bootstrap:consumers` look for DOVECOTE_APP.
"""

import gc
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import dramatiq
import structlog
from dramatiq.broker import Broker, MessageProxy
from dramatiq.middleware import CurrentMessage, Middleware
from sqlalchemy import Engine

from dovecote.broker.broker import OrjsonEncoder, OutboxBroker
from dovecote.broker.fetcher import set_to_refuse
from dovecote.broker.publisher import Publisher
from dovecote.broker.redis_client import connect_redis
from dovecote.consumer.consumer import Consumer
from dovecote.consumer.middleware import RequeueWhatFails
from dovecote.consumer.retrying import Stopping
from dovecote.consumer.time_limits import GRACE_SECONDS
from dovecote.consumer.transaction import MAX_SILENCE_SECONDS
from dovecote.envelope.message_reader import Received, RefusedMessage
from dovecote.masking import never_show
from dovecote.migrations import waiting
from dovecote.operations.maintainer import Maintainer
from dovecote.processes.children import die_with_parent
from dovecote.processes.terminal import refuse
from dovecote.relay.relay import Relay
from dovecote.route import Dovecote, InvalidRoute, Route, distinct, queues
from dovecote.settings import Settings, SettingsError, load_settings, secrets
from dovecote.settings.application import find_app
from dovecote.store.bundle import Bundle
from dovecote.store.connections import sessions_for
from dovecote.store.engines import engine_for
from dovecote.store.lookup import history_in
from dovecote.store.pauses import HandlerPaused
from dovecote.store.poison import PoisonMessage
from dovecote.telemetry.configure import configure
from dovecote.telemetry.instrumentation import ConsumerInstrumentation, RelayInstrumentation
from dovecote.telemetry.logs import log_uncaught
from dovecote.telemetry.traces import end_traces
from dovecote.unit_of_work import UnitOfWork

log = structlog.get_logger()


def consumers() -> None:
    """Set up this process to act on events of the application that DOVECOTE_APP names; called by Dramatiq."""
    start_consumers(app_or_exit())


def start_consumers(app: Dovecote) -> None:
    """Set up this process to act on events; called in each worker process of Dramatiq."""
    routes = app.routes
    settings = settings_or_exit()
    configure(settings.telemetry, "consumers")
    log_uncaught()
    # A killed master must not leave its workers behind.
    die_with_parent(signal.SIGTERM)
    stopping = threading.Event()
    instrumentation = _consumer_instrumentation(settings, app)
    middleware = [_RequiresKeys(settings, routes), _StopsWaiting(stopping), RequeueWhatFails(), _SendsLastSpans()]
    broker = broker_for(settings, middleware, instrumentation)
    engine = consumer_engine(settings, routes)
    consumer = Consumer(
        sessions_for(engine),
        app.gateways(settings),
        stopping,
        settings.consumers.outage_max_backoff_seconds,
        partial(waiting.await_current, engine, stopping, app.migration_locations),
        instrumentation,
        keyring=settings.keyring_if_given(),
    )
    declare_handlers(broker, consumer, routes)
    # What was imported lives for ever: the collector need not look at it again with every bundle.
    gc.freeze()
    # Dramatiq asks for the global broker next; without this it would make one for RabbitMQ.
    dramatiq.set_broker(broker)


def declare_handlers(broker: Broker, consumer: Consumer, routes: Sequence[Route]) -> None:
    """Make each route's handler an actor of the broker. What comes for any other is kept for code that has it.

    Errors: InvalidRoute when two routes have one handler name.
    """

    if not any(isinstance(middleware, CurrentMessage) for middleware in broker.middleware):
        # An actor that refuses a message marks it, and is called with its arguments alone.
        broker.add_middleware(CurrentMessage())

    def declare(name: str, queue: str, act: Callable[[Received], None]) -> None:
        dramatiq.actor(actor_name=name, queue_name=queue, broker=broker, throws=(Stopping, HandlerPaused))(act)

    for route in distinct(routes):
        declare(route.handler, route.queue, _actor_function(consumer, broker, route))
    if isinstance(broker, OutboxBroker):
        broker.signed_handlers.update(route.handler for route in routes)
        for queue in queues(routes):
            if queue not in broker.fallback_actors:
                # One for all handlers that this process does not have: anybody can make up a name.
                name = broker.fallback_actors[queue] = f"(not here) {queue}"
                declare(name, queue, _actor_function(consumer, broker))
        consumer.history_in_redis = partial(history_in, broker.client, broker.namespace)


def run_relay(app: Dovecote) -> None:
    """Be a relay until SIGTERM or SIGINT."""
    settings = settings_or_exit()
    configure(settings.telemetry, "relay")
    log_uncaught()
    running = relay_for(settings, app, _relay_instrumentation(settings, app))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop())
    try:
        running.run()
    finally:
        end_traces()


def relay_for(settings: Settings, app: Dovecote, instrumentation: RelayInstrumentation | None = None) -> Relay:
    """Return a relay that is not running yet."""
    return Relay(
        settings,
        publisher_for(settings, app.routes),
        app.routes,
        instrumentation,
        Maintainer(settings, app.routes, app.purges).start,
        app.migration_locations,
    )


def consumer_engine(settings: Settings, routes: Sequence[Route]) -> Engine:
    """Return an engine whose sessions a frozen process does not hold for ever.

    What it has in hand, others are given after some seconds. They wait for its locks, which is no failure of the
    event, until Postgres ends its session: none that lives is silent in a transaction for longer than this.
    """
    longest_seconds = max((route.time_limit_seconds for route in routes), default=0.0) + GRACE_SECONDS
    return engine_for(
        settings,
        "dovecote consumer",
        idle_in_transaction_session_timeout=int(1_000 * (longest_seconds + 2 * MAX_SILENCE_SECONDS)),
        # Before statement_timeout, which would be a failure.
        lock_timeout=settings.database.statement_timeout_ms // 2,
    )


def app_or_exit() -> Dovecote:
    """Return the app object that DOVECOTE_APP names, or end the process with code 2 and one sentence."""
    try:
        return find_app()
    except (SettingsError, InvalidRoute) as error:
        refuse(str(error))


def settings_or_exit() -> Settings:
    """Return the settings, or end the process with code 2 and one sentence about what is wrong."""
    try:
        settings = load_settings()
    except SettingsError as error:
        refuse(str(error))
    never_show(secrets(settings))
    # A core file would hold the keys, and lie where we were started.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return settings


def broker_for(
    settings: Settings, middleware: list[Middleware], instrumentation: ConsumerInstrumentation | None = None
) -> OutboxBroker:
    """Return a broker on the settings' Redis; no connection is made yet."""
    # Every process must speak the same JSON; the relay writes it by hand.
    dramatiq.set_encoder(OrjsonEncoder())
    return OutboxBroker(
        url=settings.redis.url.get_secret_value(),
        namespace=settings.redis.namespace,
        socket_timeout_seconds=settings.redis.socket_timeout_seconds,
        poll_interval_ms=settings.consumers.poll_interval_ms,
        heartbeat_timeout=settings.consumers.heartbeat_timeout_ms,
        # The relay reaps every few seconds; the workers need not.
        maintenance_chance=0,
        middleware=middleware,
        instrumentation=instrumentation,
    )


def publisher_for(settings: Settings, routes: Sequence[Route]) -> Publisher:
    """Return what a relay publishes with on the settings' Redis; no connection is made yet."""
    # As long as a broker waits, in which it may also block on its queue.
    timeout_seconds = settings.redis.socket_timeout_seconds + settings.consumers.poll_interval_ms / 1_000
    return Publisher(
        connect_redis(settings.redis.url.get_secret_value(), timeout_seconds),
        settings.redis.namespace,
        queues(routes),
        heartbeat_timeout_ms=settings.consumers.heartbeat_timeout_ms,
        publish_bytes=settings.relay.publish_bytes,
    )


def _consumer_instrumentation(settings: Settings, app: Dovecote) -> ConsumerInstrumentation | None:
    if not settings.telemetry.http_port:
        return None
    from dovecote.exporter.server import show_consumers  # slow to import

    return show_consumers(settings, app)


def _relay_instrumentation(settings: Settings, app: Dovecote) -> RelayInstrumentation | None:
    if not settings.telemetry.http_port:
        return None
    from dovecote.exporter.server import show_relay  # slow to import

    return show_relay(settings, app)


def _actor_function(consumer: Consumer, broker: Broker, route: Route | None = None) -> Callable[[Received], None]:
    """Return what opens messages and acts on their events; without a route it leaves them to their schedule."""

    def act(received: Received) -> None:
        try:
            contents = consumer.open(received, route)
            its_route = route or Route(handler=contents.handler, events=(), function=_not_here, queue=contents.queue)
        except (RefusedMessage, InvalidRoute) as error:
            refused = error if isinstance(error, RefusedMessage) else RefusedMessage("unreadable", str(error))
            set_to_refuse(_message_at_hand(), refused)
            return
        poison = None
        if received.crashes and isinstance(broker, OutboxBroker):
            queue = f"{broker.namespace}:{received.queue}"
            poison = PoisonMessage(broker.client, consumer.message_keys, queue, received.id, received.crashes)
        bundle = Bundle(its_route, contents.envelopes, contents.retry, contents.replay, contents.sent_in, poison)
        with consumer.instrumentation.in_flight(its_route.handler, len(contents.envelopes)):
            if route:
                consumer.consume(bundle)
            else:
                consumer.keep_for_other_code(bundle)

    return act


def _message_at_hand() -> MessageProxy:
    message: Any = CurrentMessage.get_current_message()
    assert message is not None, "Dramatiq calls an actor with a message"
    return cast(MessageProxy, message)


def _not_here(_event: object, _uow: UnitOfWork, _gateways: object) -> NoReturn:
    raise AssertionError("what is kept for other code is not acted on")


class _RequiresKeys(Middleware):
    """Ends a process that was started without keys on a queue whose handlers need them. Others do without."""

    def __init__(self, settings: Settings, routes: Sequence[Route]) -> None:
        self._settings = settings
        self._queues = {route.queue for route in routes if route.wants_keys}

    def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
        asked_for: set[str] | None = worker.consumer_whitelist
        if self._queues & (asked_for or self._queues):
            try:
                self._settings.keyring()
            except SettingsError as error:
                refuse(str(error))


class _StopsWaiting(Middleware):
    """Has consumers that wait for a server requeue their message when the process must end."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def before_worker_shutdown(self, broker: Broker, worker: dramatiq.Worker) -> None:
        self._stopping.set()


class _SendsLastSpans(Middleware):
    """Sends what was not exported yet: Dramatiq's processes end without a word to `atexit`."""

    def after_worker_shutdown(self, broker: Broker, worker: dramatiq.Worker) -> None:
        end_traces()
