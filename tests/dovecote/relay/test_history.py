"""Redis and Postgres agree, or a new history begins: what is queued goes, what is not done is sent."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text

from dovecote.operations.doctor import postgres as doctor
from dovecote.operations.doctor.finding import Subject
from dovecote.relay import history as history_module
from dovecote.relay.fence import Claim, Fence, RedisFence
from dovecote.relay.history import History, OtherRun
from dovecote.store.relay_state import TakenOver, take_over
from dovecote.store.runs import Run, server_run
from dovecote.telemetry.instrumentation import RelayInstrumentation, RelayState
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.postgres_back import PostgresThatGoesBack, postgres_that_goes_back
from tests.support.processes import a_place_for_servers, eventually
from tests.support.system import System, publisher_of, system_for

pytestmark = pytest.mark.servers

SystemOn = Callable[..., System]

COMMIT_ASYNCHRONOUSLY = """
    create function careless() returns trigger language plpgsql as $$
    begin perform set_config('synchronous_commit', 'off', true); return null; end $$;
    create constraint trigger careless after insert on effects deferrable initially deferred
        for each row execute function careless()
"""
EVENTS = 20


@pytest.fixture
def system_on(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[SystemOn]:
    """Builds systems that share a Redis namespace, each on a database of its own."""
    with ExitStack() as stack:
        namespace = f"test-{uuid4().hex[:8]}"

        def build(url: str = fresh_database_url) -> System:
            settings = settings_for(url, servers.redis_url, tmp_path, DOVECOTE_REDIS__NAMESPACE=namespace)
            system = stack.enter_context(system_for(settings, [a_route(bundle_size=5)]))
            make_room_for_effects(system.engine)
            return system

        yield build


def value(system: System, query: str, **parameters: object) -> Any:
    with system.engine.begin() as connection:
        return connection.scalar(text(query), parameters)


def history(system: System) -> str | None:
    found: str | None = value(system, "select history from dovecote.relay_state where redis_run_id is not null")
    return found


def heartbeat(system: System) -> int:
    found: int = value(system, "select last_value from dovecote.relay_heartbeat")
    return found


def queued(system: System) -> list[str]:
    client: Any = system.broker.client
    return [id.decode() for id in client.lrange(f"{system.settings.redis.namespace}:test", 0, -1)]


def in_redis(system: System) -> Fence:
    return RedisFence(system.publisher).read()


def change(system: System, **fields: object) -> None:
    """Change what Redis knows of the relay."""
    client: Any = system.broker.client
    client.hset(system.publisher.fence_keys[1], mapping=fields)


def change_heartbeat(system: System, by: int) -> None:
    client: Any = system.broker.client
    client.hincrby(system.publisher.fence_keys[1], "heartbeat", by)


def a_run(system: System, **changes: int) -> str:
    """The run of Postgres that the system uses, or one like it."""
    with psycopg.connect(system.settings.database.url.get_secret_value()) as connection:
        ours = Run.read(server_run(connection))
    assert ours is not None
    return " ".join(
        str(getattr(ours, name) + changes.get(name, 0)) for name in ("system", "timeline", "started_us", "database")
    )


def put_back(system: System, table: str) -> None:
    with system.engine.begin() as connection:
        connection.execute(text(f"create table dump as table {table}"))
        connection.execute(text(f"truncate {table}"))
        connection.execute(text(f"insert into {table} select * from dump"))
        connection.execute(text("drop table dump"))


@contextmanager
def one_leadership(system: System) -> Iterator[None]:
    """A relay leads and has made sure of Redis."""
    epoch = value(system, "select epoch from dovecote.relay_state")
    with system.relay():
        is_known = "select epoch > :epoch and redis_run_id like '%@' || epoch from dovecote.relay_state"
        eventually(lambda: value(system, is_known, epoch=epoch), 5, "a Redis that is known")
        yield


def published_and_not_consumed(system: System) -> None:
    write_quotes(system, range(EVENTS))
    with one_leadership(system):
        eventually(lambda: len(queued(system)) == EVENTS // 5, 5, "everything on the queue")
        eventually(lambda: heartbeat(system) > 0, 5, "a heartbeat")


# What is as it was left, and what is not ----------------------------------------------------------

WIPE = "for _, key in ipairs(redis.call('keys', ARGV[1])) do redis.call('del', key) end"

AS_IT_WAS: dict[str, Callable[[System], object]] = {
    "nothing has happened": lambda system: None,
    "the relay died between telling Postgres and telling Redis": lambda system: change_heartbeat(system, -1),
}
NOT_AS_IT_WAS: dict[str, Callable[[System], object]] = {
    "Redis has forgotten all": lambda system: system.broker.client.eval(
        WIPE, 0, f"{system.settings.redis.namespace}:*"
    ),
    "Redis is another process": lambda system: value(
        system, "update dovecote.relay_state set redis_run_id = 'another@' || epoch returning epoch"
    ),
    "Redis has an older fence": lambda system: system.broker.client.decr(system.publisher.fence_keys[0]),
    "Redis went back with its memory": lambda system: change_heartbeat(system, -2),
    "Postgres went back with its memory": lambda system: change_heartbeat(system, 1),
    "Redis is in a history that Postgres does not know": lambda system: change(system, history="another"),
    "Redis was written to by another run of Postgres": lambda system: change(system, instance="1 1 1"),
    "Postgres has begun anew": lambda system: value(
        system, "update dovecote.relay_state set instance = '1 1 1' returning epoch"
    ),
    "Postgres has never heard of histories": lambda system: value(
        system, "update dovecote.relay_state set instance = null, history = null returning epoch"
    ),
    "a dump was restored into the same database": lambda system: put_back(system, "dovecote.relay_state"),
}


def test_a_new_leader_begins_a_new_history_where_anything_is_not_as_it_was_left(system_on: SystemOn) -> None:
    system = system_on()
    published_and_not_consumed(system)

    for what, happens in [*AS_IT_WAS.items(), *NOT_AS_IT_WAS.items()]:
        known, ids = history(system), queued(system)
        happens(system)

        with one_leadership(system):
            assert (history(system) == known) == (what in AS_IT_WAS), what
            # Other ids: who acknowledges a message of the old history must not take away one of the new.
            assert len(queued(system)) == len(ids), what
            assert set(queued(system)).isdisjoint(ids) == (what in NOT_AS_IT_WAS), what
            assert in_redis(system).history == history(system)

    with system.running():
        system.until_quiet()
    assert sorted(effect.price for effect in effects_in(system.engine)) == list(range(EVENTS))


UNDER_A_LEADER: dict[str, Callable[[System], object]] = {
    "Redis went back by one heartbeat": lambda system: change_heartbeat(system, -1),
    "Redis is in another history": lambda system: change(system, history="another"),
    "Redis has lost the fence": lambda system: system.broker.client.delete(*system.publisher.fence_keys),
}


def test_a_leader_notices_within_a_beat_that_redis_is_not_as_it_left_it(system_on: SystemOn) -> None:
    system = system_on()
    published_and_not_consumed(system)

    def moves_from(before: int) -> bool:
        return heartbeat(system) > before

    def is_not(known: str | None) -> bool:
        return history(system) not in (None, known)

    with one_leadership(system):
        for what, happens in UNDER_A_LEADER.items():
            known, ids = history(system), queued(system)
            eventually(partial(moves_from, heartbeat(system)), 5, "a heartbeat")

            happens(system)

            eventually(partial(is_not, known), 5, what)
            assert set(queued(system)).isdisjoint(ids), what
            assert len(queued(system)) == len(ids), what


def test_a_redis_is_known_only_when_all_that_it_lost_is_sent_again(system_on: SystemOn) -> None:
    system = system_on()
    known = "select redis_run_id from dovecote.relay_state"

    def crash_in_between() -> None:
        raise ZeroDivisionError

    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        taken = TakenOver(value(system, "select epoch from dovecote.relay_state"), run=server_run(connection))
        history = History(taken, connection=connection, broker=publisher_of(system.broker))
        with pytest.raises(ZeroDivisionError):
            history.verify_redis(crash_in_between)
        assert value(system, known) is None

        history.verify_redis(lambda: None)

    assert value(system, known) is not None


def test_the_epoch_jumps_past_everything_that_redis_has_heard_of(system_on: SystemOn) -> None:
    system = system_on()
    system.broker.client.set(system.publisher.fence_keys[0], 1_000)

    with one_leadership(system):
        assert system.status().relay.epoch == in_redis(system).epoch == 1_001


def test_the_beat_stands_still_while_nothing_is_under_way(system_on: SystemOn) -> None:
    system = system_on()
    published_and_not_consumed(system)
    with one_leadership(system):
        before = heartbeat(system)
        eventually(lambda: heartbeat(system) > before + 1, 5, "heartbeats while messages are queued")
        with system.workers():
            system.until_quiet()
        time.sleep(1.5)  # the tick that finds the queue empty, and whatever came before it
        before, seen = heartbeat(system), in_redis(system)
        time.sleep(2.2)  # two ticks
        assert heartbeat(system) == before
        assert in_redis(system).silent_ms < 2_000 < seen.silent_ms + 2_200, "Redis knows that the leader lives"


def test_both_sessions_of_a_leader_are_of_one_run(system_on: SystemOn) -> None:
    system = system_on()
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        ours = TakenOver(1, run=server_run(connection))
        History(ours, connection=connection, broker=system.publisher).require_one_run()

        with pytest.raises(OtherRun, match="is of run 1 2 3"):
            History(TakenOver(1, run="1 2 3"), connection=connection, broker=system.publisher).require_one_run()


# Two databases and one Redis ----------------------------------------------------------------------


class States(RelayInstrumentation):
    """Remembers what the relay said it was doing."""

    def __init__(self) -> None:
        self.reported: list[RelayState] = []

    def alive(self, state: RelayState) -> None:
        self.reported.append(state)


def test_a_relay_stands_back_while_one_of_a_newer_postgres_lives(system_on: SystemOn) -> None:
    system = system_on()
    write_quotes(system, range(EVENTS))
    newer, states = a_run(system, timeline=1, started_us=-1), States()
    fence = RedisFence(system.publisher)
    fence.claim(Claim(3, "theirs", newer, 0), over="")

    with system.relay(states):
        eventually(lambda: system.status().relay.stands_back_for, 5, "it stands back")
        found = system.status().relay
        assert (found.leading, found.stands_back_for) == (False, newer)
        with psycopg.connect(
            system.settings.database.url.get_secret_value(), row_factory=psycopg.rows.namedtuple_row
        ) as connection:
            said = doctor.relay(connection, Subject(system.settings, system.routes, time.time))
        assert "stands back" in said.found
        assert said.level == "error"
        assert set(states.reported) <= {"standing_back"}
        assert in_redis(system).history == "theirs"

        change(system, seen=0)

        eventually(lambda: len(queued(system)) == EVENTS // 5, 5, "everything on the queue")
        assert system.status().relay.stands_back_for is None


def test_a_leader_whose_redis_a_newer_postgres_has_taken_drops_nothing_there(system_on: SystemOn) -> None:
    system = system_on()
    published_and_not_consumed(system)
    theirs = Claim(system.status().relay.epoch + 1, "theirs", a_run(system, started_us=1), 0)
    with one_leadership(system):
        assert system.status().relay.epoch == theirs.epoch, "both have come to the same epoch"

        RedisFence(system.publisher).claim(theirs, over=str(history(system)))
        ids = queued(system)

        eventually(lambda: system.status().relay.stands_back_for, 5, "it stands back")
        assert in_redis(system).history == "theirs"
        assert queued(system) == ids


def test_a_leader_that_sends_again_for_long_is_not_taken_for_dead(
    system_on: SystemOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_HEARTBEAT_SECONDS", 0.05)
    system = system_on()
    with psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True) as connection:
        leader = History(take_over(connection, 0, "a test"), connection=connection, broker=system.publisher)

        def search_for_long() -> None:
            change(system, seen=0)
            eventually(lambda: in_redis(system).silent_ms < 1_000, 5, "a sign of life")

        leader.verify_redis(search_for_long)


def test_of_two_databases_that_were_one_the_newer_has_redis_to_itself(
    system_on: SystemOn, servers: Servers, fresh_database_url: str
) -> None:
    system = system_on()
    published_and_not_consumed(system)
    system.engine.dispose()
    name = f"dovecote_copy_{uuid4().hex[:8]}"
    with psycopg.connect(servers.postgres_url, autocommit=True) as admin:
        admin.execute(f"create database {name} template {make_url(fresh_database_url).database}")
        try:
            database = system.settings.database.model_copy(update={"url": SecretStr(servers.database(name))})
            settings = system.settings.model_copy(update={"database": database})
            with system_for(settings, system.routes) as copy, one_leadership(system), one_leadership(copy):
                eventually(lambda: system.status().relay.stands_back_for, 5, "the older one stands back")
                begun = history(copy)
                write_quotes(system, [100])
                write_quotes(copy, [200])
                with copy.workers():
                    copy.until_quiet()
                assert sorted(effect.price for effect in effects_in(copy.engine)) == [*range(EVENTS), 200]
                assert history(copy) == in_redis(system).history == begun
                assert effects_in(system.engine) == []
        finally:
            admin.execute(f"drop database {name} with (force)")


# Postgres goes back -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresThatGoesBack]:
    # What is committed without asking for more reaches the disk ten seconds later.
    lazy = {"synchronous_commit": "off", "wal_writer_delay": "10s", "bgwriter_delay": "10s", "autovacuum": "off"}
    with a_place_for_servers() as place, postgres_that_goes_back(place, lazy) as postgres:
        yield postgres


@pytest.fixture
def database_that_goes_back(postgres: PostgresThatGoesBack) -> str:
    name = f"dovecote_test_{uuid4().hex[:8]}"
    with psycopg.connect(postgres.url, dbname="postgres", autocommit=True) as admin:
        admin.execute(f"create database {name} template dovecote")
    return make_url(postgres.url).set(database=name).render_as_string(hide_password=False)


PHANTOMS = """
    select count(*) from dovecote.processed_events p
    where not exists (select from dovecote.outbox where id = p.event_id)
"""


def test_what_a_restored_snapshot_remembers_is_done_once_and_what_it_has_forgotten_is_not_queued_any_more(
    system_on: SystemOn, postgres: PostgresThatGoesBack, database_that_goes_back: str
) -> None:
    system = system_on(database_that_goes_back)
    with system.relay():
        write_quotes(system, range(10))
        eventually(lambda: len(queued(system)) == 2, 5, "everything on the queue")
        snapshot = postgres.snapshot()
        with system.workers():
            system.until_quiet()
        write_quotes(system, range(100, 105))
        eventually(lambda: len(queued(system)) == 1, 5, "what will be forgotten is on the queue")
        known = history(system)

        system.engine.dispose()
        postgres.restore(snapshot)

        eventually(lambda: history(system) not in (None, known), 20, "a new history")
        write_quotes(system, [200])
        with system.workers():
            system.until_quiet()
    assert sorted(effect.price for effect in effects_in(system.engine)) == [*range(10), 200]
    assert value(system, PHANTOMS) == 0


def test_a_crash_that_forgets_what_was_acknowledged_forgets_no_event(
    system_on: SystemOn, postgres: PostgresThatGoesBack, database_that_goes_back: str
) -> None:
    system = system_on(database_that_goes_back)
    # A handler is not let off with a setting that it leaves; a trigger at the COMMIT is not seen by anybody.
    with system.engine.begin() as connection:
        connection.execute(text(COMMIT_ASYNCHRONOUSLY))
    with system.relay():
        write_quotes(system, range(10))
        eventually(lambda: len(queued(system)) == 2, 5, "everything on the queue")
        postgres.forget_from_now_on()
        before = heartbeat(system)
        eventually(lambda: heartbeat(system) > before + 1, 10, "heartbeats")
        client: Any = system.broker.client
        published = int(client.hget(system.publisher.fence_keys[1], "heartbeat"))
        crash(system, postgres)
        assert heartbeat(system) >= published, "Redis had a heartbeat that was not on disk"
        eventually(lambda: history(system), 20, "a Redis that is known")
    postgres.forget_from_now_on()
    with system.workers():
        eventually(lambda: len(effects_in(system.engine)) == 10 and not queued(system), 10, "effects")
        crash(system, postgres)
        assert len(effects_in(system.engine)) < 10, "this crash forgets nothing"
        with system.relay():
            system.until_quiet()
    assert sorted(effect.price for effect in effects_in(system.engine)) == list(range(10))


def crash(system: System, postgres: PostgresThatGoesBack) -> None:
    system.engine.dispose()
    postgres.crash()
    postgres.start()
