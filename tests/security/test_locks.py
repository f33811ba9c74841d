"""A login without any role takes advisory locks with keys of ours for ever: writers write, relays lead all the same.

Also one that forges announcements or hides its own, one that floods the relay with wake-ups, and a leader whose
sessions end one by one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url

from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.leader_lock import LeaderLock, LeadershipLost
from dovecote.relay.wakeup import Wakeup
from dovecote.telemetry.instrumentation import RelayInstrumentation
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, effects_in, make_room_for_effects, write_quotes
from tests.support.processes import eventually
from tests.support.system import System, system_for

pytestmark = pytest.mark.servers

APPEND = "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')"
LOW_WATERMARK = "select last_position, safe_position from dovecote.low_watermark()"
ACTIVE_WRITERS = "select * from dovecote.active_writers()"
ANNOUNCE = "select pg_advisory_lock_shared((17602::bigint << 48) | %s)"
LEADER = "select pid, login from dovecote.leader()"

Connection = psycopg.Connection[Any]
Connect = Callable[[str], Connection]


@pytest.fixture(scope="module")
def logins(servers: Servers) -> Iterator[dict[str, str]]:
    """Name -> login, of the roles of which it is a member: none for `stranger`."""
    roles = {"stranger": "", "writer": "dovecote_writer", "worker": "dovecote_worker", "operator": "dovecote_operator"}
    names = {name: f"{name}_{uuid4().hex[:8]}" for name in roles}
    with psycopg.connect(servers.postgres_url, autocommit=True) as admin:
        for name, login in names.items():
            admin.execute(f"create role {login} login password 'secret'")
            admin.execute(f"alter role {login} set search_path = dovecote, public")
            if roles[name]:
                admin.execute(f"grant {roles[name]} to {login}")
        yield names
        for login in names.values():
            admin.execute(f"drop role {login}")


@pytest.fixture
def connect(fresh_database_url: str, logins: dict[str, str]) -> Iterator[Connect]:
    """Opens a session of a login; of `admin` without a name."""
    with ExitStack() as stack:

        def opened(name: str = "admin") -> Connection:
            url = make_url(fresh_database_url)
            if name != "admin":
                url = url.set(username=logins[name], password="secret")
            text = url.render_as_string(hide_password=False)
            return stack.enter_context(psycopg.connect(text, autocommit=True))

        yield opened


@pytest.fixture
def system(
    fresh_database_url: str, servers: Servers, logins: dict[str, str], tmp_path: Path, connect: Connect
) -> Iterator[System]:
    """A system whose relay and consumers have the rights of dovecote_worker, and no more."""
    worker = make_url(fresh_database_url).set(username=logins["worker"], password="secret")
    url = worker.render_as_string(hide_password=False)
    fast = {"DOVECOTE_RELAY__LEADER_TIMEOUT_SECONDS": "3", "DOVECOTE_RELAY__STANDBY_INTERVAL_SECONDS": "0.05"}
    settings = settings_for(url, servers.redis_url, tmp_path, **fast)
    with system_for(settings_for(fresh_database_url, servers.redis_url, tmp_path), [a_route()]) as as_admin:
        make_room_for_effects(as_admin.engine)
    # The table of the tests' handlers is in the schema of the login that made it.
    connect("admin").execute(f"grant all on effects, effects_n_seq to {logins['worker']}")
    with system_for(settings, [a_route()]) as system:
        yield system


# Writers ------------------------------------------------------------------------------------------


def test_a_writer_writes_though_a_stranger_holds_every_key_it_would_announce_with(connect: Connect) -> None:
    stranger, writer, admin = connect("stranger"), connect("writer"), connect("admin")
    for position in range(50):
        stranger.execute("select pg_advisory_lock((17602::bigint << 48) | %s)", (position,))

    with writer.transaction():
        writer.execute(APPEND)
        writer.execute(APPEND)

        assert admin.execute(LOW_WATERMARK).fetchone() == (2, 0)
        assert admin.execute("select positions from dovecote.active_writers()").fetchone() == ([0],)
    assert admin.execute(LOW_WATERMARK).fetchone() == (2, 2)


def test_with_some_keys_taken_a_writer_announces_a_lower_position(connect: Connect) -> None:
    stranger, writer, admin = connect("stranger"), connect("writer"), connect("admin")
    for _ in range(40):
        writer.execute(APPEND)
    for position in (39, 40, 41):
        stranger.execute("select pg_advisory_lock((17602::bigint << 48) | %s)", (position,))

    with writer.transaction():
        writer.execute(APPEND)

        (last, safe) = admin.execute(LOW_WATERMARK).fetchone() or (0, 0)
    assert last == 41
    assert safe < 39


def test_what_a_stranger_announces_is_not_heeded(connect: Connect) -> None:
    stranger, writer, admin = connect("stranger"), connect("writer"), connect("admin")
    writer.execute(APPEND)
    stranger.execute(ANNOUNCE, (0,))

    assert admin.execute(LOW_WATERMARK).fetchone() == (1, 1)
    with stranger.transaction():
        stranger.execute("select pg_current_xact_id()")
        assert admin.execute(ACTIVE_WRITERS).fetchone() == ([], [])
    with writer.transaction():
        writer.execute(APPEND)
        assert admin.execute(LOW_WATERMARK).fetchone() == (2, 1)
    assert admin.execute(LOW_WATERMARK).fetchone() == (2, 2)


def test_what_a_stranger_prepares_is_not_heeded_and_what_a_writer_prepares_is(connect: Connect) -> None:
    stranger, writer, admin = connect("stranger"), connect("writer"), connect("admin")
    theirs, ours = f"s{uuid4().hex}", f"w{uuid4().hex}"
    writer.execute(APPEND)
    stranger.execute("begin")
    stranger.execute("select pg_advisory_xact_lock_shared(17602::bigint << 48)")
    stranger.execute(f"prepare transaction '{theirs}'")
    assert admin.execute(LOW_WATERMARK).fetchone() == (1, 1)

    writer.execute("begin")
    writer.execute(APPEND)
    writer.execute(f"prepare transaction '{ours}'")
    seen = admin.execute(LOW_WATERMARK).fetchone()
    in_flight = admin.execute("select positions from dovecote.active_writers()").fetchone()
    named = admin.execute("select prepared from dovecote.foreign_locks()").fetchall()
    for name in (theirs, ours):
        admin.execute(f"rollback prepared '{name}'")

    assert seen == (2, 1)
    assert in_flight == ([1],)
    assert named == [(theirs,)]


@contextmanager
def written_by_a_definer(stranger: Connection, admin: Connection) -> Iterator[None]:
    admin.execute(f"create function public.place() returns void language sql security definer as $${APPEND}$$")
    with stranger.transaction():
        stranger.execute("select public.place()")
        yield


@contextmanager
def written_after_a_savepoint(writer: Connection, admin: Connection) -> Iterator[None]:
    with writer.transaction():
        writer.execute("savepoint one")
        writer.execute(APPEND)
        writer.execute("rollback to one")
        writer.execute(APPEND)
        writer.execute("release one")
        yield


@contextmanager
def copied(writer: Connection, admin: Connection) -> Iterator[None]:
    columns = "id, aggregate_type, aggregate_id, event_type, payload, headers"
    (id,) = admin.execute("select dovecote.uuid_v7()").fetchone() or (None,)
    with writer.transaction():
        with writer.cursor().copy(f"copy dovecote.outbox ({columns}) from stdin") as copy:
            copy.write_row((str(id), "order", "1", "shop.order_placed.v1", "{}", "{}"))
        yield


@contextmanager
def with_another_role(stranger: Connection, admin: Connection) -> Iterator[None]:
    admin.execute(f"grant dovecote_writer to {stranger.info.user}")
    stranger.execute("begin; set local role dovecote_writer")
    admin.execute(f"revoke dovecote_writer from {stranger.info.user}")
    stranger.execute(APPEND)
    yield
    stranger.execute("commit")


@pytest.mark.parametrize(
    ("login", "write"),
    [
        ("stranger", written_by_a_definer),
        ("writer", written_after_a_savepoint),
        ("writer", copied),
        ("stranger", with_another_role),
    ],
)
def test_every_way_to_write_is_announced(
    connect: Connect, login: str, write: Callable[[Connection, Connection], Any]
) -> None:
    admin = connect("admin")
    before, _ = admin.execute(LOW_WATERMARK).fetchone() or (0, 0)

    with write(connect(login), admin):
        last, safe = admin.execute(LOW_WATERMARK).fetchone() or (0, 0)
        in_flight = admin.execute("select cardinality(positions) from dovecote.active_writers()").fetchone()

    assert safe < last
    assert safe <= before + 1  # what is rolled back to a savepoint had a position
    assert in_flight == (1,)


@pytest.mark.parametrize(
    "claimed", ["xid", "0", "1", "999999999", "281474976710655", "281474976710656", "-1", "x", "1e3", "9" * 30]
)
def test_a_writer_that_says_it_has_announced_announces(connect: Connect, claimed: str) -> None:
    writer, admin = connect("writer"), connect("admin")
    writer.execute(APPEND)
    with writer.transaction():
        writer.execute(
            "select set_config('dovecote.announced',"
            " case %s when 'xid' then pg_current_xact_id()::text else %s end, true)",
            (claimed, claimed),
        )
        writer.execute(APPEND)

        last, safe = admin.execute(LOW_WATERMARK).fetchone() or (0, 0)
        in_flight = admin.execute("select cardinality(positions) from dovecote.active_writers()").fetchone()

    assert safe < last
    assert in_flight == (1,)


def test_a_transaction_of_many_statements_takes_one_announcement(connect: Connect) -> None:
    writer, admin = connect("writer"), connect("admin")
    with writer.transaction():
        for _ in range(5):
            writer.execute(APPEND)

        held = admin.execute(
            "select count(*) from pg_locks where pid = %s and locktype = 'advisory'", (writer.info.backend_pid,)
        ).fetchone()

    assert held == (1,)


# Leadership ---------------------------------------------------------------------------------------


def test_nobody_without_the_right_takes_the_leader_s_lock_or_keeps_the_relay_from_it(connect: Connect) -> None:
    for name in ("stranger", "writer", "operator"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connect(name).execute("begin; lock table dovecote.relay_leader in share update exclusive mode")
    # Postgres checks no right when it prepares a statement, and keeps its locks.
    operator, worker, admin = connect("operator"), connect("worker"), connect("admin")
    operator.execute("begin")
    operator.execute("prepare theirs as select * from dovecote.relay_leader for update")

    worker.execute("begin")
    worker.execute("lock table dovecote.relay_leader in share update exclusive mode nowait")

    holds = "select backend_xid, backend_xmin from pg_stat_activity where pid = %s"
    assert admin.execute(holds, (worker.info.backend_pid,)).fetchone() == (None, None)
    assert admin.execute(LEADER).fetchall() == [(worker.info.backend_pid, worker.info.user)]
    admin.execute("vacuum")


@pytest.mark.once
def test_a_leader_that_loses_either_session_stops_within_a_second(connect: Connect, system: System) -> None:
    admin = connect("admin")
    sessions = "select pid from pg_stat_activity where application_name = %s and datname = current_database()"
    with system.relay():
        for number, application in enumerate(("dovecote relay lock", "dovecote relay"), 1):
            eventually(partial(leads_in_epoch, system, number), 10, "a leader")
            for (pid,) in admin.execute(sessions, (application,)).fetchall():
                admin.execute("select pg_terminate_backend(%s)", (pid,))

            eventually(partial(leads_in_epoch, system, number + 1), 3, f"the next leadership after {application}")


def leads_in_epoch(system: System, epoch: int) -> bool:
    relay = system.status().relay
    return relay.leading and relay.epoch >= epoch


def test_the_lock_alone_keeps_a_second_relay_from_leading(connect: Connect) -> None:
    leader, second = (
        LeaderLock(lambda: connect("worker"), connect("worker"), StopFlag(), leader_timeout_seconds=15.0) for _ in "12"
    )
    with leader, second:
        assert leader.try_take()

        assert not second.try_take()
        leader.give_back()
        assert second.try_take()


def test_postgres_takes_the_lock_from_a_leader_that_is_silent_whatever_its_login(connect: Connect) -> None:
    # Before `begin` nobody asks anything in the session with the lock, as in a process that is stopped.
    frozen = LeaderLock(lambda: connect("worker"), connect("worker"), StopFlag(), leader_timeout_seconds=1.0)
    standby = LeaderLock(lambda: connect("admin"), connect("admin"), StopFlag(), leader_timeout_seconds=15.0)
    with standby, suppress(psycopg.OperationalError), frozen:
        assert frozen.try_take()
        assert not standby.try_take()

        eventually(standby.try_take, 5, "the lock")


def test_postgres_ends_the_working_session_of_a_leader_that_is_silent_and_the_leadership_with_it(
    connect: Connect,
) -> None:
    working, admin = connect("worker"), connect("admin")
    with LeaderLock(lambda: connect("worker"), working, StopFlag(), leader_timeout_seconds=1.0) as leadership:
        assert leadership.try_take()
        leadership.begin()
        assert admin.execute(LEADER).fetchone() is not None

        eventually(lambda: admin.execute(LEADER).fetchone() is None, 5, "the end of the leadership")
        with pytest.raises(LeadershipLost):
            leadership.require()


# Everything else ----------------------------------------------------------------------------------


def test_the_engine_s_other_turns_are_nobody_s_to_take(connect: Connect) -> None:
    stranger, worker, admin = connect("stranger"), connect("worker"), connect("admin")
    for purpose in (17604, 17605, 17606, 17608):
        stranger.execute("select pg_advisory_lock(%s::bigint << 48)", (purpose,))
    worker.execute("set statement_timeout = '5s'")

    worker.execute("select dovecote.ensure_partitions()")
    admin.execute("select dovecote.copy_misplaced_rows()")
    worker.execute(
        "insert into dovecote.subscriptions (handler_name, event_type, since_position) values ('h', 'a.b.v1', 0)"
    )
    moved = worker.execute("select has_moved, is_open from dovecote.move_low_water_marks(0, 0)").fetchone()

    assert moved is not None


@pytest.mark.alone
@pytest.mark.parametrize("mode", ["", "_shared"])
def test_a_stranger_with_the_release_key_holds_up_no_consumer(connect: Connect, mode: str) -> None:
    stranger, worker = connect("stranger"), connect("worker")
    (key,) = worker.execute("select dovecote.release_key('h')").fetchone() or (0,)
    stranger.execute(f"select pg_advisory_lock{mode}(%s)", (key,))
    began = time.monotonic()

    worker.execute("select dovecote.release_next('h', array['a.b.v1'], array['a'], array['1'], array[1::bigint], null)")

    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("mode", ["", "_shared"])
def test_a_stranger_with_the_wake_up_key_delays_no_event_for_long(connect: Connect, system: System, mode: str) -> None:
    stranger = connect("stranger")
    stranger.execute(f"select pg_advisory_lock{mode}(17603::bigint << 48)")

    with system.running():
        eventually(lambda: system.status().relay.leading, 10, "a leader")
        write_quotes(system, [1])
        eventually(lambda: len(effects_in(system.engine)) == 1, 5, "the effect")
        (held,) = system.status().relay.foreign_locks
    assert (held.purpose, held.pid) == ("wake-up", stranger.info.backend_pid)


def test_wake_ups_that_bring_nothing_are_followed_by_a_pause() -> None:
    slept: list[float] = []

    class Sleepless(StopFlag):
        def sleep(self, seconds: float, watched: Any = None) -> bool:
            slept.append(seconds)
            return False

    settings: Any = SimpleNamespace(busy_poll_interval_ms=10.0)
    nobody: Any = None  # nothing is asked here
    waking = Wakeup(nobody, Sleepless(), settings, RelayInstrumentation())
    for _ in range(100):
        waking.turn()
        waking.rest(was_woken=True)
    assert slept == []
    for _ in range(20):
        waking.turn()
        waking.rest(was_woken=True)
    before = len(slept)
    waking.turn()
    waking.busy()
    waking.rest(was_woken=True)

    assert slept == [0.01] * 20
    assert len(slept) == before
