"""Sizes are limited as they are worked with: what a writer may write; what a batch, a call, the relay may hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
from psycopg.rows import TupleRow
from sqlalchemy import make_url

from dovecote.bootstrap import publisher_for
from dovecote.broker.publisher import QueuedBundle
from dovecote.relay.bundler import Bundler
from dovecote.relay.fence import Claim, RedisFence
from dovecote.store.positions import multirange
from dovecote.store.reader import Reader, positions
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route
from tests.support.past_the_trigger import a_document, insert_past_the_trigger, numbers
from tests.support.processes import eventually
from tests.support.proxy import Link, Proxy

pytestmark = pytest.mark.servers

Connection = psycopg.Connection[TupleRow]


@pytest.fixture
def url(fresh_database_url: str) -> str:
    return fresh_database_url


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def append(connection: Connection, payload: str, headers: str = "{}") -> None:
    connection.execute(
        "select dovecote.append_event('price', 'EUR', 'pricing.price_quoted.v1', %s::jsonb, %s::jsonb)",
        (payload, headers),
    )


# What a writer may write --------------------------------------------------------------------------

AT_MOST = "at most 262144 are taken"
TOO_LARGE = {
    "more than Postgres can make a text of": (numbers(131071, 9_000), "far more than 262144 bytes as text"),
    "half a gigabyte as text": (numbers(131071, 4_200), "far more than 262144 bytes as text"),
    "long fractions": (numbers(-16383, 20_000), "far more than 262144 bytes as text"),
    "a few large numbers": (numbers(100000, 10), "payload has 1000037 bytes as text"),
    "control characters": (json.dumps({"x": "\x01" * 50_000}), "payload has 300009 bytes as text"),
    "twenty megabytes that compress well": (json.dumps({"x": "a" * 20_000_000}), "far more than 262144 bytes as text"),
    "one byte too many": (json.dumps({"x": "a" * (262_145 - 9)}), "payload has 262145 bytes as text"),
}


@pytest.mark.parametrize("way", ["as it is sent", "compressed, from another table"])
@pytest.mark.parametrize("payload", TOO_LARGE)
def test_a_payload_that_is_too_large_as_text_is_refused_in_words(
    connection: Connection, payload: str, way: str
) -> None:
    text, words = TOO_LARGE[payload]
    connection.execute("create table staging (payload jsonb)")
    connection.execute("insert into staging values (%s::jsonb)", (text,))

    from_staging = """
        insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)
        select 'price', 'EUR', 'pricing.price_quoted.v1', payload from staging
    """

    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        append(connection, text) if way == "as it is sent" else connection.execute(from_staging)

    assert words in str(refused.value)
    assert AT_MOST in str(refused.value)
    assert connection.execute("select count(*) from dovecote.outbox").fetchone() == (0,)


@pytest.mark.parametrize("headers", [numbers(131071, 9_000), numbers(131071, 1), json.dumps({"x": "a" * 16_384})])
def test_headers_that_are_too_large_as_text_are_refused_in_words(connection: Connection, headers: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="bytes as text, at most 16384 are taken"):
        append(connection, "{}", headers)


@pytest.mark.parametrize(
    "payload",
    [json.dumps({"x": "a" * (262_144 - 9)}), numbers(5000, 1), json.dumps({"x": [1] * 80_000}), a_document(250)],
    ids=["the limit", "a large number", "many small numbers", "a document"],
)
def test_what_is_within_the_limit_is_taken_however_it_is_stored(connection: Connection, payload: str) -> None:
    append(connection, payload)

    assert connection.execute("select count(*) from dovecote.outbox").fetchone() == (1,)


# What a batch holds -------------------------------------------------------------------------------


def fill(connection: Connection, kilobytes: list[int]) -> list[int]:
    return [
        insert_past_the_trigger(connection, a_document(size) if size else "{}", aggregate_id=str(n % 3))
        for n, size in enumerate(kilobytes)
    ]


def test_a_batch_is_cut_where_its_bytes_end_and_the_next_goes_on_there(connection: Connection) -> None:
    written = fill(connection, [0, 200, 0, 200, 200, 0, 0, 200, 900, 0, 0])
    reader = Reader(connection, 0, 100, batch_bytes=500_000)

    batches = []
    while (batch := reader.read()).rows:
        batches.append(batch)
        assert sum(len(envelope) for _, _, envelope in batch.rows) <= 500_000 or len(batch.rows) == 1
        assert batch.checkpoint == batch.rows[-1][0]
        assert batch.is_full == (batch.rows[-1][0] < written[-1])

    assert [position for batch in batches for position in positions(batch.rows)] == written
    assert len(batches) == 4


def test_late_rows_that_fill_a_batch_go_first_and_hold_the_checkpoint(url: str, connection: Connection) -> None:
    reader = Reader(connection, 0, 100, batch_bytes=500_000)
    with psycopg.connect(url) as late:
        # What the trigger would do, and the beginning of a transaction that stays open.
        late.execute("select pg_try_advisory_xact_lock_shared(dovecote.writer_key(0))")
        held = [insert_past_the_trigger(late, a_document(200), aggregate_id="A") for _ in range(5)]
        passed = fill(connection, [0])
        assert positions(reader.read().rows) == passed
        assert reader.checkpoint < held[0]
    newer = fill(connection, [400])

    batches = [reader.read() for _ in range(5)]

    assert [positions(batch.rows) for batch in batches] == [held[:2], held[2:4], held[4:], newer, []]
    assert [batch.checkpoint for batch in batches[:2]] == [0, 0]
    assert reader.checkpoint == newer[0]


def test_small_rows_beyond_the_bytes_of_a_batch_are_not_even_read(connection: Connection) -> None:
    written = fill(connection, [1] * 400)
    reader = Reader(connection, 0, 50_000, batch_bytes=100_000)

    batches = []
    while (batch := reader.read()).rows:
        batches.append(batch)

    assert [position for batch in batches for position in positions(batch.rows)] == written
    assert all(sum(len(envelope) for _, _, envelope in batch.rows) <= 100_000 for batch in batches)


def test_a_batch_that_is_published_again_gives_the_same_messages_in_whatever_slices(connection: Connection) -> None:
    written = fill(connection, [200, 0, 900, 0, 0, 300, 300, 300, 300, 0] * 3)
    bundler = Bundler([a_route(bundle_size=7), a_route("test.other", bundle_size=2)])
    whole = Reader(connection, 0, 100, batch_bytes=100_000_000).read()
    slices = Reader(connection, 0, 100, batch_bytes=600_000)

    again = list(bundler.bundles(slices.rows_in(multirange(written))))

    assert len(list(slices.slices_in(multirange(written)))) > 5
    assert sorted(bundle.id for bundle in again) == sorted(bundle.id for bundle in bundler.bundles(whole.rows))
    assert all(len(bundle.message) < 1_010_000 for bundle in again)


# What a call to Redis takes -----------------------------------------------------------------------


class Calls(Proxy):
    """Counts the bytes of each call of a script: what a client sends until it is answered."""

    def __init__(self, target_port: int) -> None:
        self.sizes: list[int] = []
        self._sent: dict[int, int] = {}
        super().__init__(target_port)

    def _notice(self, data: bytes, link: Link) -> None:
        self._sent[id(link)] = self._sent.get(id(link), 0) + len(data)

    def _answer(self, data: bytes, link: Link) -> bytes | None:
        self.sizes.append(self._sent.pop(id(link), 0))
        return data


def test_a_publish_takes_several_calls_when_it_is_large(servers: Servers, url: str, tmp_path: Path) -> None:
    settings = settings_for(url, servers.redis_url, tmp_path, DOVECOTE_RELAY__PUBLISH_BYTES="100000")
    sizes = [40_000, 40_000, 40_000, 300_000, 10, 10]
    with Calls(make_url(servers.redis_url).port or 6379) as proxy:
        through = settings_for(url, proxy.through(servers.redis_url), tmp_path, DOVECOTE_RELAY__PUBLISH_BYTES="100000")
        broker = publisher_for(through, [])
        RedisFence(broker).claim(Claim(1, "", "", 0), over="")
        broker.publish(1, [])  # the script is known from now on
        proxy.sizes.clear()

        added = broker.publish(1, (QueuedBundle("h", "q", str(n), b"x" * size) for n, size in enumerate(sizes)))

        client: Any = broker.client
        queued = client.lrange(f"{through.redis.namespace}:q", 0, -1)
        client.delete(*client.keys(f"{through.redis.namespace}:*"))
        large = [size for size in proxy.sizes if size > 1_000]
    assert settings.relay.publish_bytes == 100_000
    assert (added, queued) == (6, [b"0", b"1", b"2", b"3", b"4", b"5"])
    assert [size // 1_000 for size in large] == [80, 40, 300]


# What the relay holds -----------------------------------------------------------------------------


def resident_megabytes(pid: int, which: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1_024
    raise AssertionError(f"no {which} of {pid}")


@pytest.mark.once
def test_hundreds_of_rows_of_250_kb_cost_the_relay_little_and_redis_no_pause(
    servers: Servers, url: str, connection: Connection, tmp_path: Path
) -> None:
    settings = settings_for(url, servers.redis_url, tmp_path)
    with Calls(make_url(servers.redis_url).port or 6379) as proxy:
        environment = {
            **os.environ,
            "DOVECOTE_APP": "workers.app:app",
            "DOVECOTE_HOME": str(tmp_path),
            "DATABASE_URL": url,
            "REDIS_URL": proxy.through(servers.redis_url),
            "DOVECOTE_REDIS__NAMESPACE": settings.redis.namespace,
        }
        log = tmp_path / "relay.log"
        with log.open("w") as out:
            relay = subprocess.Popen(
                [sys.executable, "-m", "dovecote", "relay"], env=environment, stdout=out, stderr=out
            )
        client: Any = redis.Redis.from_url(servers.redis_url)
        try:
            eventually(lambda: "relay leads" in log.read_text(), 60, f"a leader: {log.read_text()}")
            append(connection, "{}")
            eventually(lambda: published(connection) == 1, 10, "the first event")
            idle = resident_megabytes(relay.pid, "VmRSS")
            proxy.sizes.clear()
            client.slowlog_reset()
            connection.execute(
                """
                insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)
                select 'price', 'BIG' || g, 'pricing.price_quoted.v1', jsonb_build_object('document', pad.text)
                from generate_series(1, 600) g,
                     (select string_agg(md5(random()::text), '') as text from generate_series(1, 7800)) pad
                """
            )
            eventually(lambda: published(connection) == 601, 90, f"all of them: {log.read_text()[-500:]}")
            peak = resident_megabytes(relay.pid, "VmHWM")
            slow_microseconds = [command["duration"] for command in client.slowlog_get(128)]
        finally:
            relay.terminate()
            relay.wait(20)
            for key in client.scan_iter(f"{settings.redis.namespace}:*"):
                client.delete(key)

    # One batch of all of them would be 150 MB, and its messages as much again.
    assert peak - idle < 100, f"{peak:.0f} MB, {idle:.0f} MB when idle"
    assert max(proxy.sizes) < 8_100_000
    assert sum(proxy.sizes) > 140_000_000
    assert max(slow_microseconds, default=0) < 1_000_000


def published(connection: Connection) -> int:
    (events,) = connection.execute("select coalesce(sum(events), 0) from dovecote.published_batches").fetchone() or (0,)
    return int(events)
