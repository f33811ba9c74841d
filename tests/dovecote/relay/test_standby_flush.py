"""PUBLISH_AFTER=standby, with a real standby of Postgres: nothing is published that only the primary has."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url
from structlog.testing import capture_logs

from dovecote.local.binaries import find_postgres
from dovecote.local.servers import Postgres
from dovecote.operations.doctor.postgres import standby as doctor_s_finding
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.standby_flush import NotOnStandby, StandbyFlush
from dovecote.settings import Settings
from dovecote.telemetry.instrumentation import RelayInstrumentation, RelayState
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import a_place_for_servers, eventually
from tests.support.system import system_for

pytestmark = pytest.mark.servers

BASE_BACKUP = find_postgres(os.environ).path.with_name("pg_basebackup")


class Replica(Postgres):
    """A standby that streams from another server, through a slot of its own."""

    def __init__(self, directory: Path, of: str) -> None:
        super().__init__(directory, {"fsync": "off", "max_prepared_transactions": "10"})
        self._of = of

    def _make_data(self) -> None:
        if (self.data / "PG_VERSION").exists():
            return
        self.data.mkdir(mode=0o700)
        if self._user:
            os.chown(self.data, self._user.uid, self._user.gid)
        copy = [str(BASE_BACKUP), "--pgdata", str(self.data), "--dbname", self._of, "--checkpoint=fast", "--no-sync"]
        self._run([*copy, "--write-recovery-conf", "--create-slot", "--slot=replica"])


class States(RelayInstrumentation):
    """Remembers what the relay does now."""

    now: RelayState = "starting"

    def alive(self, state: RelayState) -> None:
        self.now = state


@pytest.fixture
def replica(servers: Servers) -> Iterator[Replica]:
    """A standby of the server that all tests share."""
    if servers.origin != "embedded" or not BASE_BACKUP.exists():
        pytest.skip("the server of these tests cannot be copied")
    with a_place_for_servers() as place:
        replica = Replica(place / "replica", servers.postgres_url)
        try:
            replica.start()
            yield replica
        finally:
            replica.stop()
            with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
                inactive = "select true from pg_replication_slots where not active"
                eventually(lambda: connection.execute(inactive).fetchone(), 10, "the slot is free")
                connection.execute("select pg_drop_replication_slot('replica')")


def as_login(url: str, login: str) -> str:
    """A login that may do what a relay does, and does not see what others do."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"create role {login} login password 'secret' in role dovecote_worker")
    return make_url(url).set(username=login, password="secret").render_as_string(hide_password=False)


def test_nothing_is_published_that_no_standby_has(
    replica: Replica, fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    url, login, states = fresh_database_url, f"publisher_{os.getpid()}", States()
    settings = settings_for(as_login(url, login), servers.redis_url, tmp_path, DOVECOTE_RELAY__PUBLISH_AFTER="standby")
    with system_for(settings, [a_route()]) as system, psycopg.connect(url) as unfinished:
        with psycopg.connect(url, autocommit=True) as owner:
            owner.execute(f"grant create on schema public to {login}")
        make_room_for_effects(system.engine)
        with system.relay(states), system.workers():
            write_quotes(system, [1])
            eventually(lambda: len(effects_in(system.engine)) == 1, 3, "an event that the standby has")

            # What an open transaction has just written nobody flushes, unless the relay does.
            unfinished.execute("create table half_done as select generate_series(1, 10)")
            began = time.monotonic()
            with psycopg.connect(url, autocommit=True) as connection:
                StandbyFlush(settings.relay, connection, connection, StopFlag(), RelayInstrumentation()).await_flush()
            assert time.monotonic() - began < 3

            with psycopg.connect(url) as connection:
                assert doctor_s_finding(connection).level == "ok"
            replica.stop()
            write_quotes(system, [2])
            eventually(lambda: states.now == "waiting_for_standby", 5, "the relay waits")
            assert len(effects_in(system.engine)) == 1
            assert system.status().relay.lag_events == 1

            replica.start()
            eventually(lambda: len(effects_in(system.engine)) == 2, 10, "the standby is back")
            eventually(lambda: states.now == "leading", 5, "the relay goes on")


def test_a_relay_that_cannot_see_standbys_says_what_to_grant_and_publishes_nothing(
    settings: Settings, fresh_database_url: str
) -> None:
    relay = settings.relay.model_copy(update={"publish_after": "standby"})
    url = as_login(fresh_database_url, f"blind_{os.getpid()}")
    stop = StopFlag()
    stop.set()
    with psycopg.connect(url, autocommit=True) as connection, capture_logs() as logs:
        standby = StandbyFlush(relay, connection, connection, stop, RelayInstrumentation())

        with pytest.raises(NotOnStandby):
            standby.await_flush()

        finding = doctor_s_finding(connection)
    assert [line["cure"].partition(" to ")[0] for line in logs] == ["grant pg_read_all_stats"]
    assert finding.level == "error"
    assert "grant pg_read_all_stats to blind" in finding.advice
