"""Somebody who can write to Redis, and no more, makes consumers act, dead-letter, spin or end: none of it happens.

A message is acted on only as a relay has made it: signed, for this handler, on its queue, under its id.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import dramatiq
import orjson
import psycopg
import pytest
import redis
import structlog
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from dovecote import operations
from dovecote.consumer import middleware
from dovecote.envelope import read_bundle
from dovecote.envelope.message_reader import MessageReader, Received, RefusedMessage
from dovecote.envelope.signatures import MessageKey, MessageKeys, SigningKeys, key_id_of, newest_key, valid_keys
from dovecote.envelope.wire import TAIL_BYTES
from dovecote.relay.bundler import bundle
from dovecote.store.poison import CrashCounts, PoisonMessage
from tests.conftest import Servers
from tests.security.attacked import ENVELOPE, KEY, MORE, NOTE, OTHER, Attacked, attacked, forged
from tests.support.effects import a_route, effects_in, write_quotes
from tests.support.processes import eventually
from tests.support.profiles import examples

__all__ = ["attacked"]


# What is signed, without servers -----------------------------------------------------------------


@pytest.fixture(scope="module")
def signed() -> bytes:
    return bundle(NOTE, [1, 2], [ENVELOPE, ENVELOPE], sent_in="7 a", key=KEY).message


def test_every_byte_of_a_message_is_signed(signed: bytes) -> None:
    """One bit is turned anywhere: in handler, queue, id, options, an envelope, or the signature itself."""
    assert KEY.has_signed(signed)
    for at in range(len(signed)):
        forged = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]
        assert not (key_id_of(forged) == KEY.id and KEY.has_signed(forged)), at


@pytest.mark.parametrize(
    "forge", [lambda m: m + b" ", lambda m: m[:-1], lambda m: b" " + m, lambda m: m + m, lambda m: b""]
)
def test_nothing_may_stand_around_it(signed: bytes, forge: Callable[[bytes], bytes]) -> None:
    assert not KEY.has_signed(forge(signed))


def test_another_keys_signature_and_a_marks_are_none(signed: bytes) -> None:
    assert not KEY.has_signed(OTHER.signed(signed[:-TAIL_BYTES]))
    body = signed[:-TAIL_BYTES]
    mark = KEY.sign_crash_counts("m", body)
    assert not KEY.has_signed(body + b',"signature":"' + mark[-80:] + b'"}}')


def test_a_key_says_no_secret(signed: bytes) -> None:
    assert repr(KEY) == "MessageKey(id=b'0000000000000000')"


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    whole = bundle(NOTE, [1, 2], [ENVELOPE, ENVELOPE]).message[:-2]
    start = draw(st.integers(0, len(whole)))
    stop = draw(st.integers(start, min(len(whole), start + draw(st.sampled_from([0, 1, 5, 200])))))
    put_in = st.sampled_from([b"", b'"', b"}", b"\n", b"null", b"1e999", b"[" * 2_000, b"9" * 5_000, b'"replay":7,'])
    return whole[:start] + draw(put_in | st.binary(max_size=8)) + whole[stop:]


class _Keys(MessageKeys):
    """What a consumer knows once it has asked."""

    def __init__(self) -> None:
        self._keys, self._newest = {KEY.id: KEY}, KEY
        self._asked_at = self._tried_at = time.monotonic() + 10_000
        self._lock = threading.Lock()


@given(data=damaged() | st.binary(max_size=99) | JSONS.map(lambda one: json.dumps(one).encode()))
@example(
    data=b'{"queue_name":"test","actor_name":"test.note","args":[[\n\n]],"kwargs":{"replay":"not-a-uuid"},"message_id":"x"'
)
@example(
    data=b'{"queue_name":"test","actor_name":"test.note","args":[[\n\n]],"kwargs":{"replay":1},"message_id":"x"'
    b',"message_timestamp":1,"options":{"redis_message_id":"x"'
)
@settings(max_examples=examples(200, 100_000))
def test_whatever_is_signed_or_not_it_is_opened_or_refused(data: bytes) -> None:
    """Also what a relay would never sign: its own bug must not be a traceback of each consumer, for ever."""
    opener: Any = MessageReader(None, _Keys(), None, lambda work: work())  # type: ignore[arg-type]  # no Postgres is asked
    for message in (KEY.signed(data), data + b"}}", data):
        with suppress(RefusedMessage):
            assert opener.open(Received("test", "x", message)).queue == "test"


# A system whose Redis is not to be trusted -------------------------------------------------------


@pytest.mark.servers
@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("unsigned", lambda _: forged()),
        ("unsigned", lambda _: forged("no.such.handler" * 9)),
        ("unsigned", lambda _: forged("\x1b]0;x\x07")),
        ("unsigned", lambda _: forged(kwargs={"unknown": 1})),
        ("unsigned", lambda _: forged(kwargs={"replay": "not-a-uuid", "crashes": "9" * 100_000})),
        ("unsigned", lambda _: forged(eta=0)),
        ("unsigned", lambda _: forged(queue="nowhere")),
        ("unsigned", lambda _: bundle(NOTE, [1], [ENVELOPE]).message),
        ("unsigned", lambda _: bundle(a_route("made.up", queue="test"), [1], [ENVELOPE]).message),
        ("unknown_key", lambda _: bundle(NOTE, [1], [ENVELOPE], key=OTHER).message),
        ("forged", lambda k: bundle(NOTE, [1], [ENVELOPE], key=MessageKey.of(k.id.decode(), b"z" * 32)).message),
        ("misplaced", lambda k: bundle(NOTE, [1], [ENVELOPE], key=k).message),  # under another id
        ("misplaced", lambda k: bundle(MORE, [1], [ENVELOPE], key=k).message),  # and on another handler's queue
        ("unreadable", lambda _: b"\xff" * 99),
        ("unreadable", lambda _: b""),
        ("unreadable", lambda _: b"[" * 100_000),
        ("unreadable", lambda _: b"9" * 100_000),
        ("too_large", lambda _: b"x" * 17_000_000),
    ],
)  # fmt: skip
def test_a_message_that_no_relay_made_is_refused_once(
    attacked: Attacked, reason: str, message: Callable[[MessageKey], bytes]
) -> None:
    before = effects_in(attacked.system.engine), set(attacked.system.broker.actors)

    with structlog.testing.capture_logs() as logged:
        reasons = attacked.refusals_of(lambda: [attacked.put("test", message(attacked.key)) for _ in range(12)])

    assert reasons == {reason}
    assert (effects_in(attacked.system.engine), set(attacked.system.broker.actors)) == before
    assert len([line for line in logged if line["event"].startswith("message refused")]) <= 1
    attacked.honest_event_is_acted_on()
    with attacked.postgres() as connection:
        assert connection.execute("select count(*) from dovecote.deliveries").fetchone() == (0,)


@pytest.mark.servers
def test_a_signed_message_is_worth_nothing_under_another_id_or_on_another_queue(attacked: Attacked) -> None:
    sent = bundle(NOTE, [7], [ENVELOPE], key=attacked.key)

    assert attacked.refusals_of(lambda: attacked.put("more", sent.message, sent.id), "more") == {"misplaced"}
    assert attacked.refusals_of(lambda: attacked.put("test.DQ", sent.message, sent.id), "test.DQ") == {"misplaced"}
    assert attacked.refusals_of(lambda: attacked.put("test", sent.message, b"\xff\xfe")) == {"unreadable"}


@pytest.mark.servers
def test_a_forged_delayed_message_is_not_put_on_the_queue_in_its_time(attacked: Attacked) -> None:
    delayed = forged(queue="test.DQ", eta=1)

    assert attacked.refusals_of(lambda: attacked.put("test.DQ", delayed, "m"), "test.DQ") == {"unsigned"}


@pytest.mark.servers
def test_a_flood_leaves_a_bounded_number_of_dead_letters(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dovecote.broker.broker._MAX_DEAD_LETTERS", 5)
    attacked.redis.delete(f"{attacked.prefix}test.XQ", f"{attacked.prefix}test.XQ.msgs")

    attacked.refusals_of(lambda: [attacked.put("test", b"junk") for _ in range(50)])

    assert attacked.redis.zcard(f"{attacked.prefix}test.XQ") == 5
    assert attacked.redis.hlen(f"{attacked.prefix}test.XQ.msgs") == 5
    found = {finding.check: finding for finding in operations_examined(attacked)}
    assert "refused" in (found["queues.dead_letters"].advice or "")


def operations_examined(attacked: Attacked) -> Sequence[Any]:
    from dovecote.operations.doctor import flow
    from dovecote.operations.doctor.finding import Subject

    return flow.findings(Subject(attacked.system.settings, attacked.system.routes, time.time))


@pytest.mark.servers
def test_ids_in_a_list_that_stand_for_nothing_are_held_by_nobody(attacked: Attacked) -> None:
    attacked.redis.rpush(f"{attacked.prefix}test", *(f"x{number}" for number in range(500)))

    eventually(attacked.is_gone, 5, "the list to be empty")
    assert attacked.redis.scard(f"{attacked.prefix}__acks__.{attacked.system.broker.broker_id}.test") == 0
    attacked.honest_event_is_acted_on()


@pytest.mark.servers
def test_made_up_key_ids_do_not_hammer_postgres(attacked: Attacked) -> None:
    asked: list[float] = []

    def sessions() -> Session:
        asked.append(time.monotonic())
        return attacked.system.sessions()

    keys: Any = MessageKeys(sessions)  # type: ignore[arg-type]  # it only makes sessions
    assert keys.find(attacked.key.id) == attacked.key
    for number in range(1_000):
        assert keys.find(f"{number:016x}".encode()) is None

    assert len(asked) == 1


# Crash counts and marks --------------------------------------------------------------------------


@pytest.mark.servers
@pytest.mark.parametrize("crashes", [b"3", b"9" * 100_000, b"-1", b"x", b"\xff", b""])
def test_a_hand_made_crash_count_buries_nothing(attacked: Attacked, crashes: bytes) -> None:
    system = attacked.system
    with attacked.postgres() as connection:
        connection.execute(
            "insert into dovecote.paused_handlers (handler_name, actor, reason) values (%s, 'a', 'b')",
            (NOTE.handler,),
        )
    write_quotes(system, [5])
    held = f"{attacked.prefix}test.held.{NOTE.handler}"
    eventually(lambda: attacked.redis.llen(held), 10, "a message to attack")
    (id,) = attacked.redis.lrange(held, 0, -1)
    event_id = str(read_bundle(attacked.redis.hget(f"{attacked.prefix}test.msgs", id)).envelopes[0].event_id)
    attacked.redis.hset(f"{attacked.prefix}test.crashes", id, crashes)
    counts = orjson.dumps(CrashCounts({event_id: 3}))
    attacked.redis.hset(f"{attacked.prefix}test.in_flight", id, OTHER.sign_crash_counts(id.decode(), counts))
    with attacked.postgres() as connection:
        connection.execute("delete from dovecote.paused_handlers")
        connection.execute("notify dovecote_pauses")

    eventually(lambda: attacked.is_gone(), 10, "it to be done")

    attacked.honest_event_is_acted_on()
    with attacked.postgres() as connection:
        assert connection.execute("select count(*) from dovecote.deliveries").fetchone() == (0,)
        connection.execute("truncate effects")


@pytest.fixture(scope="module")
def poison(servers: Servers) -> Iterator[tuple[PoisonMessage, Any]]:
    with redis.Redis.from_url(servers.redis_url) as client:
        name = f"test-{uuid4().hex[:8]}:test"
        yield PoisonMessage(client, _Keys(), name, "m", 9), lambda counts: client.hset(f"{name}.in_flight", "m", counts)
        client.delete(f"{name}.in_flight")


EVENT = UUID(int=7)
COUNTS = st.binary(max_size=200) | JSONS.map(lambda one: str(one).encode()) | st.sampled_from(
    [
        b"{}",
        b'{"by_event":{},"explained":{}}',
        b'{"by_event":{"00000000-0000-0000-0000-000000000007":3},"explained":0}',
        b"[" * 5_000,
        b"9" * 9_999,
        b"\n" * 99,
    ]
)  # fmt: skip


@given(counts=COUNTS | st.builds(lambda m, id: OTHER.sign_crash_counts(id, m), COUNTS, st.sampled_from(["m", "n"]))
       | st.builds(lambda m: KEY.sign_crash_counts("another message", m), COUNTS))  # fmt: skip
@settings(max_examples=examples(200, 100_000))
def test_crash_counts_that_no_consumer_signed_for_this_message_count_as_none(
    poison: tuple[PoisonMessage, Any], counts: bytes
) -> None:
    known, write = poison
    write(counts)

    assert known.crash_count(EVENT) == 0
    during, after = known.in_flight(EVENT)
    assert (during, after) == (CrashCounts({str(EVENT): 1}), CrashCounts({}))


# A line that is no envelope ----------------------------------------------------------------------


@pytest.mark.servers
@pytest.mark.parametrize(
    "broken", [b'{"zz', b"", b"\xff\xfe", b"null", b"[1]", b"[" * 5_000, ENVELOPE[:60] + b'x"\n' + ENVELOPE[60:]]
)
def test_an_unreadable_line_takes_nobody_along(attacked: Attacked, broken: bytes) -> None:
    with attacked.postgres() as connection:
        rows = [
            connection.execute(
                "select dovecote.append_event('price', %s, 'test.unrouted.v1', '{}', '{}')", (f"S{number}",)
            ).fetchone()[0]  # type: ignore[index]  # a function returns a row
            for number in range(3)
        ]
        good = {"symbol": "S", "price": "1", "as_of": "2026-11-20T12:00:00Z", "occurred_at": "2026-11-20T12:00:00Z"}
        lines = []
        for row in rows:
            (position,) = connection.execute(
                "select position from dovecote.outbox where id = %s", (row,)
            ).fetchone() or (0,)
            fields = orjson.loads(ENVELOPE) | {"id": str(row), "position": str(position), "data": good}
            lines.append(orjson.dumps(fields))
    lines[1] = lines[1][:70] + broken + lines[1][90:]
    with attacked.postgres() as connection:
        (run,) = connection.execute("select dovecote.outbox_run()").fetchone() or ("",)
    sent = bundle(NOTE, [position], lines, sent_in=run, key=attacked.key)

    attacked.put("test", sent.message, sent.id)
    eventually(attacked.is_gone, 5, "it to be done")

    with attacked.postgres() as connection:
        done = connection.execute(
            "select event_id from dovecote.processed_events where event_id = any(%s)", (rows,)
        ).fetchall()
        failed = connection.execute("delete from dovecote.deliveries returning event_id, error_type").fetchall()
    assert {id for (id,) in done} == {rows[0], rows[2]}
    assert [(id, kind) for id, kind in failed] == [(rows[1], "InvalidEvent")]


# Keys --------------------------------------------------------------------------------------------


@pytest.mark.servers
def test_nobody_but_relays_and_consumers_reads_a_secret(attacked: Attacked) -> None:
    with attacked.postgres() as connection:
        for role in ("writer", "operator", "viewer", "service"):
            with connection.transaction(force_rollback=True):
                connection.execute(f"set local role dovecote_{role}")
                with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                    connection.execute("select secret from dovecote.message_keys")
                with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                    connection.execute("select dovecote.make_message_key()")
        with connection.transaction(force_rollback=True):
            connection.execute("set local role dovecote_worker")
            assert newest_key(connection) == attacked.key
            for statement in ("delete from dovecote.message_keys", "select dovecote.rotate_message_key('me', 'x')"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege), connection.transaction():
                    connection.execute(statement)
        ((granted,),) = connection.execute(
            "select has_table_privilege('public', 'dovecote.message_keys', 'select')"
        ).fetchall()
        assert not granted


def test_what_was_signed_with_a_revoked_key_is_refused_and_sent_again(
    attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dovecote.envelope.signatures._POLL_INTERVAL_SECONDS", 0.2)
    engine, old = attacked.system.engine, attacked.key
    with pytest.raises(operations.validation.WrongRequest, match="the only one"):
        operations.keys.revoke(engine, old.id.decode(), actor="ada", reason="stolen")
    made = operations.keys.rotate(engine, actor="ada", reason="a test")
    assert made is not None
    with attacked.postgres() as connection:
        assert newest_key(connection) == old, "consumers may not know the new one yet"
        connection.execute(
            "update dovecote.message_keys set made_at = made_at - interval '1 minute' where id = %s", (made.id,)
        )
        connection.execute(
            "update dovecote.message_keys set made_at = made_at - interval '1 hour' where id <> %s", (made.id,)
        )
        assert newest_key(connection).id == made.id.encode()
        connection.execute(
            "insert into dovecote.paused_handlers (handler_name, actor, reason) values (%s, 'a', 'b')",
            (NOTE.handler,),
        )
    write_quotes(attacked.system, [77])
    held = f"{attacked.prefix}test.held.{NOTE.handler}"
    eventually(lambda: attacked.redis.llen(held), 10, "a message that waits")

    operations.keys.revoke(engine, old.id.decode(), actor="ada", reason="stolen")
    with attacked.postgres() as connection:
        assert set(valid_keys(connection)) == {made.id.encode()}
        connection.execute("delete from dovecote.paused_handlers")
        connection.execute("notify dovecote_pauses")

    old_message = bundle(NOTE, [1], [ENVELOPE], key=old).message
    eventually(
        lambda: attacked.refusals_of(lambda: attacked.put("test", old_message)) == {"unknown_key"}, 5, "the revocation"
    )
    eventually(lambda: 77 in [effect.price for effect in effects_in(engine)], 10, "the event that waited")
    lines = [(line.action, line.reason) for line in operations.audit.list_audit_entries(engine, action="keys").items]
    assert lines == [("keys.revoke", "stolen"), ("keys.rotate", "a test")]
    with attacked.postgres() as connection:
        assert connection.execute(
            "select secret from dovecote.message_keys where id = %s", (old.id.decode(),)
        ).fetchone() == (None,)
        attacked.key = newest_key(connection)
    attacked.honest_event_is_acted_on()


# Bugs of our own, and other programs -------------------------------------------------------------


@pytest.mark.servers
def test_a_message_that_fails_time_after_time_is_refused_in_the_end(
    attacked: Attacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "_MAX_REQUEUES", 3)
    tried: list[int] = []

    def fail(*_: object, **__: object) -> None:
        tried.append(1)
        raise TypeError("a bug")

    monkeypatch.setattr(attacked.system.consumer, "consume", fail)
    sent = bundle(NOTE, [99], [ENVELOPE], key=attacked.key)
    assert attacked.refusals_of(lambda: attacked.put("test", sent.message, sent.id)) == {"failed"}
    assert len(tried) == 4


@pytest.mark.servers
def test_another_programs_actor_on_our_queue_still_works_and_a_queue_of_nowhere_kills_no_thread(
    attacked: Attacked,
) -> None:
    done: list[str] = []
    broker = attacked.system.broker
    dramatiq.actor(actor_name="others", queue_name="test", broker=broker)(done.append)

    def message(queue: str = "test", id: str = "o") -> bytes:
        return orjson.dumps(
            {
                "queue_name": queue,
                "actor_name": "others",
                "args": ["x"],
                "kwargs": {},
                "options": {"redis_message_id": id},
                "message_id": id,
                "message_timestamp": 0,
            }
        )

    attacked.put("test", message(), "o")
    eventually(lambda: done == ["x"], 5, "the other program's message")
    assert attacked.refusals_of(lambda: [attacked.put("test", message("nowhere", "p"), "p") for _ in range(8)]) == {
        "misplaced"
    }
    assert attacked.refusals_of(lambda: attacked.put("test", message(id="another"), "q")) == {"misplaced"}
    attacked.honest_event_is_acted_on()


# Last: it leaves keys behind.
@pytest.mark.servers
def test_a_relay_learns_once_that_a_key_was_revoked(attacked: Attacked) -> None:
    engine = attacked.system.engine
    with attacked.postgres() as connection:
        # A key of this test: the others sign with the first one.
        stolen = operations.keys.rotate(engine, actor="ada", reason="a test")
        assert stolen is not None
        connection.execute("update dovecote.message_keys set made_at = made_at - interval '1 minute'")
        keys = SigningKeys(connection)
        before = keys.refresh()
        operations.keys.revoke(engine, stolen.id, actor="ada", reason="stolen")

        assert [before, keys.refresh(), keys.refresh()] == [False, True, False]
