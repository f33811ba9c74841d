"""In one wave of an ordered replay, an aggregate's events are one bundle: two would be taken at the same time."""

from collections.abc import Callable, Iterable, Iterator
from uuid import UUID

import orjson
import psycopg
import pytest
from sqlalchemy import text

from dovecote.broker.publisher import QueuedBundle
from dovecote.envelope import Envelope, read_envelope
from dovecote.operations import replays
from dovecote.operations.replays import Request
from dovecote.relay.bundler import Bundler
from dovecote.relay.replayer import Replayer
from dovecote.route import Route
from dovecote.settings import Settings
from dovecote.store.bundle import Bundle
from dovecote.store.reader import Reader
from dovecote.store.replays import ReplaySelection
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

BUNDLE_SIZE = 4
ROUTE = a_route(replayable=True, ordered=True, bundle_size=BUNDLE_SIZE)
PRICES = 40
SYMBOLS = ("EUR", "USD", "CHF", "GBP", "SEK", "NOK")


@pytest.fixture
def system(settings: Settings) -> Iterator[System]:
    with system_for(settings, [ROUTE]) as system:
        make_room_for_effects(system.engine)
        yield system


class ActsAtOnce:
    """A broker whose bundles are acted on when they are published; it remembers them wave by wave."""

    def __init__(self, act: Callable[[list[Envelope]], None]) -> None:
        self._act = act
        self.waves: list[list[list[Envelope]]] = []

    def publish(self, _epoch: int, bundles: Iterable[QueuedBundle]) -> int:
        wave = [[read_envelope(one) for one in orjson.loads(bundle.message)["args"][0]] for bundle in bundles]
        self.waves.append(wave)
        for envelopes in wave:
            self._act(envelopes)
        return len(wave)


def test_the_events_of_an_aggregate_in_one_wave_are_one_bundle(system: System) -> None:
    for price in range(PRICES):
        for symbol in SYMBOLS:
            write_quotes(system, [price], symbol)
    with system.engine.connect() as connection:
        written = connection.scalars(text("select dovecote.envelope(o) from dovecote.outbox o order by position"))
        system.consumer.consume(Bundle(ROUTE, [read_envelope(orjson.loads(one)) for one in written]))
    request = Request(
        handler=ROUTE.handler, mode="reprocess", filter=ReplaySelection(), reason="a test", actor="tester"
    )
    id = replays.start(system.engine, [ROUTE], request).replay_id
    assert id is not None

    waves = waves_of(system, ROUTE, id)

    for wave in waves:
        bundles_with = [{envelope.aggregate_id for envelope in bundle} for bundle in wave]
        assert sum(map(len, bundles_with)) == len(set().union(*bundles_with)), f"in two bundles: {bundles_with}"
    # A wave of one bundle would prove nothing.
    assert max(map(len, waves)) > 1
    assert len(effects_in(system.engine)) == 2 * PRICES * len(SYMBOLS)


def at_once(work: Callable[[], object]) -> None:
    work()


def waves_of(system: System, route: Route, id: UUID) -> list[list[list[Envelope]]]:
    """Play the leader of a replay until it is over; return its waves, each with the events of its bundles."""
    broker = ActsAtOnce(lambda envelopes: system.consumer.consume(Bundle(route, envelopes, replay=id)))
    url = system.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as connection:
        reader = Reader(connection, 0, 1_000)
        reader.read()
        epoch = connection.execute("select epoch from dovecote.relay_state").fetchone()
        assert epoch is not None
        replayer = Replayer(
            connection=connection,
            reader=reader,
            bundler=Bundler([route]),
            broker=broker,  # type: ignore[arg-type]  # all that a replay of this mode asks of it
            routes=[route],
            epoch=epoch[0],
            retry_while_unavailable=at_once,
        )
        for _ in range(100_000):
            replayer.step()
            if replays.get_replay(system.engine, id).is_over:
                return broker.waves
    raise AssertionError("the replay came to no end")
