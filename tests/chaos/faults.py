"""What each fault does: it begins, lasts as long as the schedule says, and is ended.

Each is a context manager, named like its kind in schedule.py. One that finds nothing to befall raises Moot.
"""

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial

import psutil

from dovecote.local.servers import Postgres, Redis
from tests.chaos import clocks, rewinds
from tests.chaos.commits import PostgresProxy
from tests.chaos.schedule import Fault
from tests.chaos.stage import Moot, Stage, one_of

Befall = Callable[[Stage, Fault], AbstractContextManager[None]]

_SKEW_SECONDS = 90.0
_DELAY_SECONDS = 0.2
_COMMITS_LOST = 6


def befall(stage: Stage, fault: Fault) -> AbstractContextManager[None]:
    """Return the fault, to be entered when it begins and left when it ends."""
    return FAULTS[fault.kind](stage, fault)


# Processes ---------------------------------------------------------------------------------------


def _victims(stage: Stage, who: str, dice: float) -> psutil.Process:
    if who == "leader":
        return stage.leader()
    if who == "standby":
        return stage.standby()
    those = {"worker": stage.workers, "master": stage.masters, "writer": stage.writers}[who]()
    return one_of(those, dice, f"no {who} is there")


@contextmanager
def _signalled(who: str, sig: signal.Signals, stage: Stage, fault: Fault) -> Iterator[None]:
    with suppress(psutil.NoSuchProcess):
        _victims(stage, who, fault.dice).send_signal(sig)
    yield


@contextmanager
def _frozen(who: str, stage: Stage, fault: Fault) -> Iterator[None]:
    victim = _victims(stage, who, fault.dice)
    with suppress(psutil.NoSuchProcess):
        victim.suspend()
    yield
    with suppress(psutil.NoSuchProcess):
        victim.resume()


@contextmanager
def _frozen_and_deposed(stage: Stage, fault: Fault) -> Iterator[None]:
    """The leader stops in its tracks and its sessions end: a standby takes over, and then it wakes up.

    There are two: one with the lock, and the one it works in, which has the key that older relays go by.
    """
    with _frozen("leader", stage, fault), stage.connection() as connection:
        connection.execute("select pg_terminate_backend(pid) from dovecote.leader()")
        yield


# Servers -----------------------------------------------------------------------------------------


@contextmanager
def _down(server: str, sig: signal.Signals | None, stage: Stage, _fault: Fault) -> Iterator[None]:
    _program(stage, server).stop(sig)
    yield
    _start(stage, server)


@contextmanager
def _backend_killed(stage: Stage, fault: Fault) -> Iterator[None]:
    """SIGKILL for one backend: Postgres ends all others and recovers, as it does when memory runs out."""
    pids = _backends(stage)
    psutil.Process(pids[int(fault.dice * (len(pids) - 1))]).kill()
    yield


@contextmanager
def _backends_terminated(stage: Stage, fault: Fault) -> Iterator[None]:
    pids = _backends(stage)
    share = pids[: max(1, int(fault.dice * len(pids)))]
    with stage.connection() as connection:
        connection.execute("select pg_terminate_backend(pid) from unnest(%s::int[]) as victim (pid)", (share,))
    yield


def _backends(stage: Stage) -> list[int]:
    with stage.connection() as connection:
        found = connection.execute(
            "select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
            " order by md5(pid::text)"
        ).fetchall()
    if not found:
        raise Moot("nobody is connected")
    return [pid for (pid,) in found]


@contextmanager
def _read_only(stage: Stage, _fault: Fault) -> Iterator[None]:
    """What a failover to a standby that is not promoted yet looks like."""
    _let_postgres(stage, "alter system set default_transaction_read_only = on")
    yield
    _let_postgres(stage, "alter system reset default_transaction_read_only")


def _let_postgres(stage: Stage, statement: str) -> None:
    with stage.connection() as connection:
        connection.execute("set default_transaction_read_only = off")
        connection.execute(statement.encode())
        connection.execute("select pg_reload_conf()")


@contextmanager
def _redis_empty(stage: Stage, _fault: Fault) -> Iterator[None]:
    """A failover to a server without any data."""
    stage.redis.kill()
    shutil.rmtree(stage.redis.data / "appendonlydir")
    yield
    stage.start_redis()


@contextmanager
def _redis_a_second_short(stage: Stage, _fault: Fault) -> Iterator[None]:
    """The last second had not reached the disk: `appendfsync everysec` promises no more."""
    # Two of them while the file is being rewritten; what is written now goes to the newer one.
    log = max((stage.redis.data / "appendonlydir").glob("*.incr.aof"), key=lambda file: file.stat().st_mtime)
    size = log.stat().st_size
    time.sleep(1)  # the second that will be forgotten
    stage.redis.kill()
    with log.open("r+b") as file:
        file.truncate(size)
    yield
    stage.start_redis()


@contextmanager
def _redis_flushed(stage: Stage, _fault: Fault) -> Iterator[None]:
    stage.client().flushall()
    yield


@contextmanager
def _redis_full(stage: Stage, _fault: Fault) -> Iterator[None]:
    stage.client().config_set("maxmemory", "1")
    yield
    stage.client().config_set("maxmemory", "0")


@contextmanager
def _redis_paused(stage: Stage, fault: Fault) -> Iterator[None]:
    """It takes connections and answers nobody, as while it saves or swaps."""
    stage.client().client_pause(int(1_000 * fault.seconds))
    yield


@contextmanager
def _redis_password_changed(stage: Stage, _fault: Fault) -> Iterator[None]:
    client = stage.client()
    password = client.connection_pool.connection_kwargs["password"]
    client.config_set("requirepass", "another")
    client.client_kill_filter(_type="normal", skipme=True)
    yield
    client.config_set("requirepass", password)


def _program(stage: Stage, server: str) -> Postgres | Redis:
    return stage.postgres if server == "postgres" else stage.redis


def _start(stage: Stage, server: str) -> None:
    (stage.start_postgres if server == "postgres" else stage.start_redis)()


# Network and clocks ------------------------------------------------------------------------------


@contextmanager
def _delayed(way: str, stage: Stage, fault: Fault) -> Iterator[None]:
    stage.proxies[way].delay(_DELAY_SECONDS * fault.dice)
    yield
    stage.proxies[way].heal()


@contextmanager
def _cut(way: str, stage: Stage, _fault: Fault) -> Iterator[None]:
    stage.proxies[way].refuse()
    yield
    stage.proxies[way].heal()


@contextmanager
def _black_holed(way: str, stage: Stage, fault: Fault) -> Iterator[None]:
    """At the end the bytes arrive after all, or, as often, the connections turn out to be gone."""
    stage.proxies[way].stall()
    yield
    if fault.dice < 0.5:
        stage.proxies[way].cut()
    stage.proxies[way].heal()


@contextmanager
def _commit_replies_lost(way: str, stage: Stage, _fault: Fault) -> Iterator[None]:
    proxy = stage.proxies[way]
    assert isinstance(proxy, PostgresProxy)
    proxy.lose_commit_replies(_COMMITS_LOST)
    yield
    proxy.heal()


@contextmanager
def _skewed(role: str, stage: Stage, fault: Fault) -> Iterator[None]:
    clocks.put_wrong(stage.directory, role, _SKEW_SECONDS if fault.dice < 0.5 else -_SKEW_SECONDS)
    yield
    clocks.put_wrong(stage.directory, role, 0)


FAULTS: dict[str, Befall] = {
    "relay_leader_killed": partial(_signalled, "leader", signal.SIGKILL),
    "relay_standby_killed": partial(_signalled, "standby", signal.SIGKILL),
    "relay_leader_terminated": partial(_signalled, "leader", signal.SIGTERM),
    "relay_leader_frozen": partial(_frozen, "leader"),
    "relay_leader_frozen_and_deposed": _frozen_and_deposed,
    "worker_killed": partial(_signalled, "worker", signal.SIGKILL),
    "worker_frozen": partial(_frozen, "worker"),
    "workers_master_killed": partial(_signalled, "master", signal.SIGKILL),
    "workers_terminated": partial(_signalled, "master", signal.SIGTERM),
    "writer_killed": partial(_signalled, "writer", signal.SIGKILL),
    "writer_frozen": partial(_frozen, "writer"),
    "postgres_restarted": partial(_down, "postgres", signal.SIGINT),
    "postgres_crashed": partial(_down, "postgres", signal.SIGQUIT),
    "postgres_killed": partial(_down, "postgres", signal.SIGKILL),
    "postgres_backend_killed": _backend_killed,
    "postgres_backends_terminated": _backends_terminated,
    "postgres_read_only": _read_only,
    "postgres_failed_over": rewinds.failed_over,
    "postgres_snapshot_restored": rewinds.snapshot_restored,
    "postgres_crashed_asynchronously": rewinds.crashed_asynchronously,
    "redis_restarted": partial(_down, "redis", signal.SIGTERM),
    "redis_killed": partial(_down, "redis", signal.SIGKILL),
    "redis_back_empty": _redis_empty,
    "redis_back_a_second_short": _redis_a_second_short,
    "redis_flushed": _redis_flushed,
    "redis_full": _redis_full,
    "redis_paused": _redis_paused,
    "redis_password_changed": _redis_password_changed,
    **{
        f"{role}_to_{server}_{trouble}": partial(befalls, f"{role} to {server}")
        for role, server in (
            ("relay", "postgres"),
            ("relay", "redis"),
            ("workers", "postgres"),
            ("workers", "redis"),
            ("writers", "postgres"),
        )
        for trouble, befalls in {"delayed": _delayed, "cut": _cut, "black_holed": _black_holed}.items()
    },
    **{
        f"{role}_commit_replies_lost": partial(_commit_replies_lost, f"{role} to postgres")
        for role in ("relay", "workers", "writers")
    },
    **{f"{role}_clock_skewed": partial(_skewed, role) for role in ("relay", "workers", "writers")},
}
