"""Kill -9 with the settings of production: others take over in the time that is promised."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from tests.conftest import Servers, settings_for
from tests.flows.replay_process import HELD, ROUTE
from tests.support.effects import effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

ROOT = Path(__file__).parents[2]

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
    urls = settings.database.url.get_secret_value(), settings.redis.url.get_secret_value()
    with ExitStack() as stack:

        def start(part: str) -> subprocess.Popen[bytes]:
            words = [part, *urls, settings.redis.namespace, str(tmp_path)]
            process = subprocess.Popen([sys.executable, "-m", "tests.flows.replay_process", *words], cwd=ROOT)
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
            return process

        yield start


def leader(system: System) -> int:
    """The process that leads; 0 while none does."""
    with system.engine.connect() as connection:
        query = text("select coalesce(split_part(owner, ':', 2), '0') from dovecote.relay_state")
        return int(connection.execute(query).scalar_one())


def standbys(system: System) -> int:
    """Sessions of relays that ask again and again whether anybody leads."""
    with system.engine.connect() as connection:
        query = text(
            # Each relay that leads or stands by has a session for the leader's lock.
            "select count(*) - 1 from pg_stat_activity where datname = current_database()"
            " and application_name = 'dovecote relay lock'"
        )
        return int(connection.execute(query).scalar_one())


def waits_for_us(system: System) -> bool:
    with system.engine.connect() as connection:
        query = text(
            "select exists (select from pg_locks where not granted and locktype = 'advisory' and objid = :held)"
        )
        return bool(connection.execute(query, {"held": HELD}).scalar_one())


def live_workers(system: System) -> int:
    return system.broker.client.zcard(f"{system.settings.redis.namespace}:__heartbeats__")


def test_what_a_killed_worker_had_in_hand_is_acted_on_within_15_seconds(system: System, start: Start) -> None:
    start("relay")
    killed = start("consumers")
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as us:
        us.execute("select pg_advisory_lock(%s)", (HELD,))
        write_quotes(system, [HELD, 1, 2])
        eventually(lambda: waits_for_us(system), 30, "a worker in the middle of its handler")
        start("consumers")
        eventually(lambda: live_workers(system) == 2, 30, "a worker that can take over")

        killed.kill()
        us.execute("select pg_advisory_unlock(%s)", (HELD,))

        eventually(lambda: len(effects_in(system.engine)) == 3, 15, "the effects, by the other worker")
    assert [effect.price for effect in effects_in(system.engine)] == [HELD, 1, 2]


@pytest.mark.alone
def test_a_standby_publishes_within_2_seconds_of_the_death_of_the_leader(system: System, start: Start) -> None:
    relays = [start("relay") for _ in range(2)]
    eventually(lambda: leader(system), 30, "a leader")
    eventually(lambda: standbys(system) == 1, 30, "a standby")
    (leading,) = [relay for relay in relays if relay.pid == leader(system)]

    leading.kill()
    write_quotes(system, [1])

    eventually(lambda: system.status().relay.published == 1, 2, "published by the standby")
    assert leader(system) != leading.pid
