"""A running system, and somebody who can write to its Redis."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import orjson
import psycopg
import pytest
from dramatiq.common import q_name

from dovecote.envelope.signatures import MessageKey, newest_key
from dovecote.telemetry.instrumentation import ConsumerInstrumentation
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

KEY, OTHER = MessageKey.of("0" * 16, b"x" * 32), MessageKey.of("1" * 16, b"y" * 32)
NOTE, MORE = a_route("test.note", queue="test"), a_route("test.more", queue="more")
ENVELOPE = (
    b'{"specversion":"1.0","id":"01a1f94c-b163-7128-b3a1-26224ce3d3c1","source":"/dovecote/price",'
    b'"type":"pricing.price_quoted.v1","subject":"EUR","time":"2026-11-20T12:00:00+00:00","position":"1",'
    b'"data":{"symbol": "EUR"}}'
)


@dataclass
class Counted(ConsumerInstrumentation):
    """Counts what is refused."""

    reasons: list[tuple[str, str]] = field(default_factory=list)

    def refused(self, queue: str, reason: str) -> None:
        self.reasons.append((queue, reason))


class Attacked:
    """A running system, and what somebody with its Redis can do."""

    def __init__(self, system: System, instrumentation: Counted) -> None:
        self.system, self.instrumentation = system, instrumentation
        self.redis: Any = system.broker.client
        self.prefix = f"{system.settings.redis.namespace}:"
        with self.postgres() as connection:
            self.key = newest_key(connection)
        self._price = 1_000

    def postgres(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.system.settings.database.url.get_secret_value(), autocommit=True)

    def put(self, queue: str, message: bytes, id: str | bytes | None = None) -> str | bytes:
        id = id or "b" + uuid4().hex
        self.redis.hset(f"{self.prefix}{queue}.msgs", id, message)
        self.redis.rpush(f"{self.prefix}{queue}", id)
        return id

    def is_gone(self, queue: str = "test") -> bool:
        return not self.redis.exists(f"{self.prefix}{queue}.msgs") and not self.redis.exists(f"{self.prefix}{queue}")

    def refusals_of(self, attack: Callable[[], object], queue: str = "test") -> set[str]:
        """Return why what the attack has put on the queue was refused, once none of it is there."""
        self.instrumentation.reasons.clear()
        attack()
        eventually(lambda: self.is_gone(queue), 10, "the queue to be empty")
        return {reason for at, reason in self.instrumentation.reasons if at == q_name(queue)}

    def honest_event_is_acted_on(self, within_seconds: float = 5) -> None:
        self._price += 1
        write_quotes(self.system, [self._price])
        price = self._price
        eventually(
            lambda: (
                {e.handler for e in effects_in(self.system.engine) if e.price == price} == {"test.note", "test.more"}
            ),
            within_seconds,
            "an honest event, as ever",
        )


def forged(handler: str = "test.note", queue: str = "test", kwargs: object = None, **options: object) -> bytes:
    """As t_forge.py writes it, in the words of Dramatiq."""
    envelope = orjson.loads(ENVELOPE) | {"id": str(uuid4())}
    message = {
        "queue_name": queue,
        "actor_name": handler,
        "args": [[envelope]],
        "kwargs": kwargs or {},
        "options": {"redis_message_id": "m", **options},
        "message_id": "m",
        "message_timestamp": 0,
    }
    return orjson.dumps(message)


@pytest.fixture(scope="module")
def attacked(servers: Servers, database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    instrumentation = Counted()
    own = settings_for(database_url, servers.redis_url, tmp_path_factory.mktemp("home"))
    with system_for(own, [NOTE, MORE], instrumentation) as system:
        make_room_for_effects(system.engine)
        with system.running():
            attacked = Attacked(system, instrumentation)
            attacked.honest_event_is_acted_on()
            yield attacked
