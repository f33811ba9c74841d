"""Kill -9 the relay and the workers, and wipe Redis, in the middle of a replay: each event acts again exactly once."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dovecote.operations import replays
from tests.conftest import Servers, settings_for
from tests.flows.replay_process import ROUTE
from tests.support.effects import effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

ROOT = Path(__file__).parents[2]
_SYMBOLS = [f"S{number}" for number in range(30)]
_EVENTS = 50  # of each symbol
_LIVE = 10_000  # and above: prices written during the replay

Start = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def system(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[System]:
    with system_for(settings_for(fresh_database_url, servers.redis_url, tmp_path), (ROUTE,)) as system:
        make_room_for_effects(system.engine)
        yield system


@pytest.fixture
def start(system: System, tmp_path: Path) -> Iterator[Start]:
    """Starts a process of this system; what is still alive at the end is killed."""
    settings = system.settings
    with ExitStack() as stack:

        def start(part: str) -> subprocess.Popen[bytes]:
            urls = settings.database.url.get_secret_value(), settings.redis.url.get_secret_value()
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.flows.replay_process",
                    part,
                    *urls,
                    settings.redis.namespace,
                    str(tmp_path),
                    "DOVECOTE_CONSUMERS__HEARTBEAT_TIMEOUT_MS=1000",
                    "DOVECOTE_RELAY__STANDBY_INTERVAL_SECONDS=0.1",
                ],
                cwd=ROOT,
                stdout=(tmp_path / f"{part}.log").open("a"),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            return process

        yield start


# Four rounds, each of which may take a minute on a busy machine.
@pytest.mark.timeout(400)
def test_killing_every_process_in_a_replay_neither_loses_nor_doubles_nor_reorders(system: System, start: Start) -> None:
    for symbol in _SYMBOLS:
        write_quotes(system, range(_EVENTS), symbol)
    relay, workers = start("relay"), start("consumers")
    system.until_quiet(60)
    request = replays.Request(handler="test.note", mode="reprocess", rate=300, reason="a test", actor="tester")
    id = replays.start(system.engine, (ROUTE,), request).replay_id
    assert id is not None

    def has_done(events: int) -> bool:
        return replays.get_replay(system.engine, id).done >= events

    for round in range(1, 5):
        eventually(lambda round=round: has_done(round * 250), 60, "some more of the replay")  # type: ignore[misc]  # bound at once
        relay.kill()
        relay = start("relay")
        if round % 2:
            wipe(system)
        workers.kill()
        workers = start("consumers")
        write_quotes(system, range(_LIVE + round * 10, _LIVE + round * 10 + 10), "S7")
    eventually(lambda: replays.get_replay(system.engine, id).is_over, 90, "the end of the replay")
    system.until_quiet(60)

    done = replays.get_replay(system.engine, id)
    assert (done.state, done.done, done.acted) == ("done", 1_500, 1_500)
    effects = effects_in(system.engine)
    times = Counter((effect.symbol, effect.price) for effect in effects)
    assert all(count == (1 if price >= _LIVE else 2) for (_, price), count in times.items())
    assert len(times) == 1_500 + 40
    for symbol in _SYMBOLS:
        prices = [effect.price for effect in effects if effect.symbol == symbol and effect.price < _LIVE]
        assert prices == [*range(_EVENTS), *range(_EVENTS)], "in order, and then again in order"


def wipe(system: System) -> None:
    client: Any = system.broker.client
    script = "for _, key in ipairs(redis.call('keys', ARGV[1])) do redis.call('del', key) end"
    client.eval(script, 0, f"{system.settings.redis.namespace}:*")
