"""The relay as a whole: woken by writers, replaced when it dies, and never the cause of a loss."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise
from typing import Any

import orjson
import psycopg
import pytest
from sqlalchemy import make_url, text

from domain.pricing import PriceQuoted
from dovecote.bootstrap import relay_for
from dovecote.errors import NewerRelay
from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.fence import Claim, RedisFence
from dovecote.relay.history import History
from dovecote.relay.leader import Leader
from dovecote.route import Dovecote
from dovecote.store.positions import multirange
from dovecote.store.reader import Reader
from dovecote.store.relay_state import TakenOver
from dovecote.store.runs import server_run
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.support.effects import (
    Writers,
    a_route,
    each_once,
    effects_in,
    note_as,
    write_quotes,
)
from tests.support.processes import eventually
from tests.support.system import System, claim, publisher_of

pytestmark = pytest.mark.servers

SystemWith = Callable[..., System]


def one_value(system: System, query: str, **parameters: object) -> Any:
    with system.engine.connect() as connection:
        return connection.scalar(text(query), parameters)


def queued_positions(system: System, queue: str = "test") -> list[int]:
    """The positions in the messages on a queue, in order."""
    key = f"{system.settings.redis.namespace}:{queue}"
    client: Any = system.broker.client
    stored = [client.hget(f"{key}.msgs", id) for id in client.lrange(key, 0, -1)]
    messages = [orjson.loads(message) for message in stored if message is not None]
    return [int(envelope["position"]) for message in messages for envelope in message["args"][0]]


def wipe(system: System, *patterns: str) -> None:
    """Take keys away all at once, as FLUSHALL would."""
    client: Any = system.broker.client
    for pattern in patterns or ("*",):
        script = "for _, key in ipairs(redis.call('keys', ARGV[1])) do redis.call('del', key) end"
        client.eval(script, 0, f"{system.settings.redis.namespace}:{pattern}")


def leader_pid(system: System) -> int | None:
    pid: int | None = one_value(system, "select max(pid) from dovecote.leader()")
    return pid


def is_asleep(system: System) -> bool:
    """Whether somebody holds the wake-up lock for itself."""
    held: bool = one_value(
        system,
        """
        select exists (select from pg_locks where locktype = 'advisory' and mode = 'ExclusiveLock' and granted
          and (classid::bigint << 32 | objid::bigint) = dovecote.wakeup_key()
          and database = (select oid from pg_database where datname = current_database()))
        """,
    )
    return held


def terminate(system: System, application: str) -> None:
    with system.engine.connect() as connection:
        connection.execute(
            text(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name = :name"
                " and datname = current_database() and pid <> pg_backend_pid()"
            ),
            {"name": application},
        )


# Wakeup up ----------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.once
def test_an_event_written_while_the_relay_sleeps_arrives_at_once(system_with: SystemWith) -> None:
    system = system_with(RELAY__POLL_INTERVAL_SECONDS=60)

    def there_are(effects: int) -> bool:
        return len(effects_in(system.engine)) == effects

    with system.running():
        waits = []
        for price in range(5):
            eventually(lambda: is_asleep(system), 5, "a sleeping relay")
            began = time.monotonic()
            write_quotes(system, [price])
            eventually(partial(there_are, price + 1), 5, "the effect")
            waits.append(time.monotonic() - began)

    assert sorted(waits)[2] < 1.0, "a single one may meet a machine that is busy"


def test_append_event_wakes_the_relay_too(system_with: SystemWith) -> None:
    system = system_with(RELAY__POLL_INTERVAL_SECONDS=60)
    with system.relay():
        eventually(lambda: is_asleep(system), 5, "a sleeping relay")

        with system.engine.begin() as connection:
            connection.execute(text("select dovecote.append_event('price', 'EUR', 'pricing.price_quoted.v1', '{}')"))

        eventually(lambda: queued_positions(system) == [1], 2, "the message")


# One leads ----------------------------------------------------------------------------------------


def test_a_standby_takes_over_when_the_leader_s_backend_is_terminated(system_with: SystemWith) -> None:
    system = system_with(RELAY__STANDBY_INTERVAL_SECONDS=0.05)
    with ExitStack() as stack:
        leader = stack.enter_context(system.relay())
        first = eventually(lambda: leader_pid(system), 5, "a leader")
        stack.enter_context(system.relay())
        stack.enter_context(system.workers())
        write_quotes(system, [1])
        system.until_quiet()

        with system.engine.connect() as connection:
            connection.execute(text("select pg_terminate_backend(:pid)"), {"pid": first})
        leader.stop()  # it would be back as soon as the standby is there
        write_quotes(system, [2])

        eventually(lambda: leader_pid(system) not in (None, first), 2, "another leader")
        eventually(lambda: len(effects_in(system.engine)) == 2, 2, "the second effect")
        assert system.until_quiet().relay.epoch >= 2
        assert [effect.price for effect in effects_in(system.engine)] == [1, 2]


def test_both_ends_of_a_relay_s_connection_notice_that_the_other_is_gone(system_with: SystemWith) -> None:
    system = system_with()
    with relay_for(system.settings, Dovecote(routes=system.routes))._session() as connection:
        ends = socket.socket(fileno=os.dup(connection.fileno()))
        theirs = [connection.execute(f"show {name}").fetchone() for name in ("tcp_keepalives_idle", "tcp_user_timeout")]
        ours = ends.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        ends.close()

    assert theirs == [("5",), ("14000",)]
    assert ours == 14_000


def test_a_statement_of_the_relay_may_take_long_whatever_the_database_allows_others(system_with: SystemWith) -> None:
    system = system_with()
    database = make_url(system.settings.database.url.get_secret_value()).database
    with system.engine.begin() as connection:
        connection.execute(text(f'alter database "{database}" set statement_timeout = 1000'))

    with relay_for(system.settings, Dovecote(routes=system.routes))._session() as relay:
        assert relay.execute("show statement_timeout").fetchone() == ("0",)


@pytest.fixture
def leader_of_epoch(system_with: SystemWith) -> Iterator[Callable[[System, int], Leader]]:
    with ExitStack() as stack:

        def build(system: System, epoch: int) -> Leader:
            connection = stack.enter_context(
                psycopg.connect(system.settings.database.url.get_secret_value(), autocommit=True)
            )
            return Leader(
                connection=connection,
                reader=Reader(connection, 0, 100),
                broker=system.publisher,
                routes=system.routes,
                settings=system.settings.relay,
                stop=StopFlag(),
                history=History(
                    TakenOver(epoch, run=server_run(connection)), connection=connection, broker=system.publisher
                ),
            )

        yield build


def test_a_relay_of_an_old_epoch_cannot_publish(
    system_with: SystemWith, leader_of_epoch: Callable[[System, int], Leader]
) -> None:
    system = system_with()
    write_quotes(system, [1])
    RedisFence(system.publisher).claim(Claim(7, "another", "", 0), over="")

    with pytest.raises(NewerRelay):
        leader_of_epoch(system, 6).lead()

    with pytest.raises(NewerRelay):
        system.publisher.publish(6, [])
    assert queued_positions(system) == []


def test_a_relay_of_an_old_epoch_cannot_record(
    system_with: SystemWith, leader_of_epoch: Callable[[System, int], Leader]
) -> None:
    system = system_with()
    write_quotes(system, [1])
    with system.engine.begin() as connection:
        connection.execute(text("update dovecote.relay_state set epoch = 7"))

    with pytest.raises(NewerRelay):
        leader_of_epoch(system, 6).lead()

    assert one_value(system, "select count(*) from dovecote.published_batches") == 0
    assert one_value(system, "select checkpoint from dovecote.relay_state") == 0


def test_a_relay_whose_record_is_refused_ends(
    system_with: SystemWith, leader_of_epoch: Callable[[System, int], Leader]
) -> None:
    system = system_with()
    claim(publisher_of(system.broker), 6)
    with system.engine.begin() as connection:
        connection.execute(text("update dovecote.relay_state set epoch = 7"))
    leader = leader_of_epoch(system, 6)
    write_quotes(system, [1])

    with pytest.raises(NewerRelay):
        leader._publish(leader._reader.read())  # Redis takes it: it does not know of the newer epoch yet

    assert queued_positions(system) == [1]
    assert leader.published_upto == 0


# What it records ----------------------------------------------------------------------------------


def test_exactly_the_positions_published_are_recorded(system_with: SystemWith) -> None:
    system = system_with()
    write_quotes(system, [1, 2])
    with suppress(ZeroDivisionError), unit_of_work(system.sessions) as uow:
        uow.session.execute(text("select dovecote.append_event('price', 'EUR', 'testing.given_up.v1', '{}')"))
        raise ZeroDivisionError
    write_quotes(system, [3])

    with system.relay():
        eventually(lambda: one_value(system, "select checkpoint from dovecote.relay_state") == 4, 5, "the checkpoint")

    recorded = one_value(system, "select range_agg(positions)::text from dovecote.published_batches")
    assert recorded == multirange([1, 2, 4])
    assert queued_positions(system) == [1, 2, 4]
    assert one_value(system, "select count(*) from dovecote.outbox_events where published_at is null") == 0


def test_a_batch_is_one_call_to_redis(system_with: SystemWith) -> None:
    routes = (a_route("test.one", bundle_size=10), a_route("test.other", bundle_size=10))
    system = system_with(*routes, RELAY__BATCH_SIZE=100)
    client: Any = system.broker.client

    def calls() -> int:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    with system.relay():
        eventually(lambda: is_asleep(system), 5, "a sleeping relay")
        before = calls()
        write_quotes(system, range(2_000))
        eventually(lambda: system.status().relay.lag_events == 0, 10, "everything on the queues")
        made = calls() - before

    batches = one_value(system, "select count(*) from dovecote.published_batches")
    assert batches == 20
    assert client.llen(f"{system.settings.redis.namespace}:test") == 400
    assert batches <= made <= batches + 8, "a few more are the reaper's"


@pytest.mark.alone
def test_stopping_ends_after_the_batch_at_hand(system_with: SystemWith) -> None:
    system = system_with(RELAY__BATCH_SIZE=50)
    write_quotes(system, range(5_000))

    with system.relay() as relay:
        eventually(lambda: one_value(system, "select count(*) from dovecote.published_batches") > 2, 5, "some batches")
        began = time.monotonic()
        relay.stop()

    assert time.monotonic() - began < 2
    recorded = one_value(system, "select range_agg(positions)::text from dovecote.published_batches")
    published = queued_positions(system)
    assert recorded == multirange(published)
    assert 0 < len(published) < 5_000, "it was done before the request to stop"


# What breaks --------------------------------------------------------------------------------------


@pytest.mark.once
def test_losing_every_key_of_redis_under_load_loses_and_doubles_nothing(system_with: SystemWith) -> None:
    def take_time(event: PriceQuoted, uow: UnitOfWork, _gateways: object) -> None:
        time.sleep(0.001)
        note_as("test.note", event, uow)

    system = system_with(a_route(function=take_time, bundle_size=20))
    with system.running():
        with Writers(system) as writers:
            for _ in range(3):
                eventually(lambda: len(queued_positions(system)) > 100, 10, "a queue that grows")
                wipe(system)
        system.until_quiet()

    effects = effects_in(system.engine)
    assert len(effects) == writers.written
    assert each_once(effects)


def test_what_is_still_queued_is_not_queued_again_when_redis_has_lost_the_rest(system_with: SystemWith) -> None:
    routes = (a_route("test.kept", queue="kept"), a_route("test.lost", queue="lost", bundle_size=7))
    system = system_with(*routes, RELAY__POLL_INTERVAL_SECONDS=60)
    with system.relay():
        write_quotes(system, range(50))
        eventually(lambda: len(queued_positions(system, "lost")) == 50, 5, "everything on the queues")

        wipe(system, "lost*", "__relay__")

        eventually(lambda: len(queued_positions(system, "lost")) == 50, 5, "what was lost, again")
        assert queued_positions(system, "lost") == list(range(1, 51))
        assert queued_positions(system, "kept") == list(range(1, 51))


@pytest.mark.parametrize("relay", ["the one that leads", "the next one"])
def test_a_redis_emptied_and_marked_again_by_an_older_relay_is_not_taken_for_the_one_we_knew(
    system_with: SystemWith, relay: str
) -> None:
    system = system_with(a_route(bundle_size=10))
    with system.relay():
        eventually(lambda: is_asleep(system), 5, "a sleeping relay")
    with ExitStack() as leading:
        leading.enter_context(system.relay())
        write_quotes(system, range(50))
        eventually(lambda: len(queued_positions(system)) == 50, 5, "everything on the queue")
        if relay == "the next one":
            leading.close()

        wipe(system)
        # What a relay does that slept through its replacement.
        RedisFence(system.publisher).claim(Claim(1, "another", "", 0), over="")

        with ExitStack() as after:
            if relay == "the next one":
                after.enter_context(system.relay())
            eventually(lambda: queued_positions(system) == list(range(1, 51)), 5, "everything again")


def test_an_event_that_waits_although_the_one_before_it_is_done_is_sent_by_the_relay(system_with: SystemWith) -> None:
    system = system_with(a_route(ordered=True))
    write_quotes(system, [1])
    with system.engine.begin() as connection:
        connection.execute(
            text(
                "insert into dovecote.deliveries"
                " (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state)"
                " select 'test.note', id, position, aggregate_type, aggregate_id, event_type, 'waiting'"
                " from dovecote.outbox"
            )
        )

    with system.running():
        eventually(lambda: effects_in(system.engine), 10, "the event that waited")

    assert one_value(system, "select count(*) from dovecote.deliveries") == 0


def test_a_retry_is_sent_when_it_is_due(system_with: SystemWith) -> None:
    tried = []

    def fail_at_first(event: Any, uow: Any, gateways: Any) -> None:
        tried.append(time.monotonic())
        if len(tried) < 3:
            raise RuntimeError

    route = a_route(function=fail_at_first, backoff_seconds=0.3, max_backoff_seconds=0.3)
    system = system_with(route, RELAY__POLL_INTERVAL_SECONDS=60)

    with system.running():
        write_quotes(system, [1])
        system.until_quiet()

    assert len(tried) == 3
    assert all(later - earlier > 0.15 for earlier, later in pairwise(tried))


def make_it_retry(system: System, due: str = "now()") -> None:
    """Let every event in the outbox be one that failed before."""
    with system.engine.begin() as connection:
        connection.execute(
            text(
                f"""
                insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,
                    event_type, state, attempts, next_attempt_at)
                select 'test.note', id, position, aggregate_type, aggregate_id, event_type, 'retrying', 1, {due}
                from dovecote.outbox
                """
            )
        )


def test_a_retry_that_got_lost_is_sent_again_after_its_lease(system_with: SystemWith) -> None:
    system = system_with(RELAY__RETRY_LEASE_SECONDS=1)
    write_quotes(system, [1])
    make_it_retry(system)
    with system.relay():
        eventually(lambda: queued_positions(system) == [1, 1], 5, "the event and its retry")

        wipe(system, "test*")

        eventually(lambda: queued_positions(system) == [1], 5, "the retry once more")


def test_a_retry_that_was_lost_with_all_of_redis_is_sent_again_at_once(system_with: SystemWith) -> None:
    system = system_with(RELAY__RETRY_LEASE_SECONDS=3_600)
    write_quotes(system, [1])
    make_it_retry(system)
    with system.relay():
        eventually(lambda: queued_positions(system) == [1, 1], 10, "the event and its retry")

        wipe(system)

        eventually(lambda: queued_positions(system) == [1], 20, "the retry once more")


def test_a_retry_that_was_lost_with_the_relay_is_sent_again_by_the_next(system_with: SystemWith) -> None:
    system = system_with(RELAY__RETRY_LEASE_SECONDS=3_600)
    write_quotes(system, [1])
    make_it_retry(system)
    with system.relay():
        eventually(lambda: queued_positions(system) == [1, 1], 10, "the event and its retry")
    wipe(system, "test*")

    with system.relay():
        eventually(lambda: queued_positions(system) == [1], 20, "the retry once more")


@pytest.mark.parametrize("state", ["retrying", "waiting"])
def test_a_relay_waits_for_no_worker_that_holds_a_delivery(system_with: SystemWith, state: str) -> None:
    system = system_with(a_route(ordered=True), RELAY__RETRY_LEASE_SECONDS=3_600)
    write_quotes(system, [1])
    make_it_retry(system)
    with system.relay():
        eventually(lambda: queued_positions(system) == [1, 1], 10, "the event and its retry")
    with system.engine.connect() as stuck:
        # A worker in the middle of its handler, or frozen there.
        stuck.execute(text("select from dovecote.deliveries for update"))
        if state == "waiting":
            stuck.rollback()
            with system.engine.begin() as connection:
                connection.execute(text("update dovecote.deliveries set state = 'waiting', next_attempt_at = null"))
            stuck.execute(text("select from dovecote.deliveries for update"))
        write_quotes(system, [2])

        with system.relay():
            eventually(lambda: queued_positions(system) == [1, 1, 2], 10, "another event, while the worker is stuck")
            write_quotes(system, [3])
            eventually(
                lambda: queued_positions(system) == [1, 1, 2, 3], 10, "one more, after a look for misplaced rows"
            )


def test_a_retry_released_before_its_last_message_is_acknowledged_is_sent_at_once(system_with: SystemWith) -> None:
    system = system_with(RELAY__RETRY_LEASE_SECONDS=3_600)
    write_quotes(system, [1])
    make_it_retry(system)
    with system.relay():
        eventually(lambda: queued_positions(system) == [1, 1], 10, "the event and its retry")

        # A worker that has it in hand parks it, and its predecessor lets it go on: all before the acknowledgement.
        with system.engine.begin() as connection:
            again = "update dovecote.deliveries set next_attempt_at = now(), updated_at = clock_timestamp()"
            connection.execute(text(again))

        eventually(lambda: queued_positions(system) == [1, 1, 1], 10, "another message for it")


def test_a_retry_that_is_still_queued_after_its_lease_is_not_queued_again(system_with: SystemWith) -> None:
    system = system_with(RELAY__RETRY_LEASE_SECONDS=1)
    write_quotes(system, [1])
    make_it_retry(system)

    def leased_until() -> Any:
        return one_value(system, "select leased_until from dovecote.deliveries")

    with system.relay():
        eventually(lambda: queued_positions(system) == [1, 1], 10, "the event and its retry")
        first = leased_until()
        eventually(lambda: leased_until() != first, 10, "another lease")
    assert queued_positions(system) == [1, 1]


def test_a_position_given_out_again_after_a_failover_is_another_message(system_with: SystemWith) -> None:
    system = system_with()
    write_quotes(system, [1])
    with system.relay():
        eventually(lambda: queued_positions(system) == [1], 10, "an event")
    with system.engine.begin() as connection:
        # The new server never heard of it.
        for table in ("outbox", "published_batches"):
            connection.execute(text(f"truncate dovecote.{table}"))
        connection.execute(text("alter sequence dovecote.outbox_position restart"))
        connection.execute(text("update dovecote.relay_state set checkpoint = 0"))
        connection.execute(text("update dovecote.progress set examined = 0, open = '{}'"))

    with system.relay():
        write_quotes(system, [2])
        eventually(lambda: queued_positions(system) == [1, 1], 10, "the event that has its position now")


def test_the_loss_of_redis_cuts_no_backoff_short(system_with: SystemWith) -> None:
    system = system_with(RELAY__RETRY_LEASE_SECONDS=3_600)
    write_quotes(system, [1])
    make_it_retry(system, due="now() + interval '1 hour'")
    with system.relay():
        eventually(lambda: queued_positions(system) == [1], 10, "the event, as it is sent first")
        write_quotes(system, [2])
        eventually(lambda: queued_positions(system) == [1, 2], 10, "another event, in a batch of its own")

        wipe(system)

        eventually(lambda: queued_positions(system) == [2], 20, "the one that never failed")
        eventually(lambda: one_value(system, "select redis_run_id from dovecote.relay_state"), 20, "a verified Redis")
    assert queued_positions(system) == [2]
    assert one_value(system, "select next_attempt_at > now() + interval '50 minutes' from dovecote.deliveries")


@pytest.mark.once
def test_terminating_the_relay_s_backend_again_and_again_loses_and_doubles_nothing(system_with: SystemWith) -> None:
    system = system_with(a_route(bundle_size=20), RELAY__BATCH_SIZE=50)

    def led(epoch: int) -> bool:
        return system.status().relay.epoch >= epoch

    with system.running():
        with Writers(system) as writers:
            for epoch in range(1, 6):
                eventually(partial(led, epoch), 30, "a relay leads")
                eventually(partial(writers.have_written, writers.written + 100), 30, "some more events")
                terminate(system, "dovecote relay")
        system.until_quiet(60)

    effects = effects_in(system.engine)
    assert len(effects) == writers.written
    assert each_once(effects)
    assert system.status().relay.epoch > 1
