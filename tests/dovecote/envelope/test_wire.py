"""SQL writes the wire format, Python completes and reads it, and Lua reads a part of it: all three agree."""

import json
import re
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
import redis
from dramatiq import Message

import dovecote
from dovecote.envelope import handler_named_in, payload_of, read_bundle, read_head
from dovecote.envelope.signatures import MessageKey, key_id_of
from dovecote.envelope.wire import (
    BEFORE_DATA,
    END,
    EVENT_ID,
    EVENT_ID_PATTERN,
    EVENT_IDS_PATTERN,
    TAIL_BYTES,
    TRACE_FLAG_AT,
    TRACEPARENT,
    TRACEPARENT_FROM,
    TRACEPARENT_TO,
    event_ids_of_first_delivery,
    unsigned_message,
)
from tests.conftest import Servers

pytestmark = pytest.mark.servers

LUA = Path(dovecote.__file__).parent / "broker" / "lua"
TRACE = f"00-{'a' * 32}-{'b' * 16}-01"
KEY = MessageKey.of("0123456789abcdef", b"s" * 32)

_APPEND = """
    insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload, headers)
    values (%s, %s, %s, %s, %s) returning id, position
"""
_ENVELOPES = """
    select convert_to(dovecote.envelope(o), 'UTF8'),
           convert_to(coalesce(dovecote.small_envelope(o), dovecote.envelope(o)), 'UTF8')
    from dovecote.outbox o where id = %s
"""

#: Aggregate type and id, event type, and payload: the shortest attributes, the longest, and texts that look like more.
ROWS = {
    "shortest": ("a", "1", "a.b.v1", {}),
    "longest": ("a" * 63, "\x01" * 200, f"{'a' * 98}.{'b' * 98}.v1", {"x": 1}),
    "imitating": ("price", '","position":"1","data":{"traceparent":"00-', "a.b.v1", {"traceparent": TRACE, "data": {}}),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest, database_url: str) -> tuple[UUID, int, bytes]:
    """An event with a trace: its id, its position, and its envelope as SQL writes it."""
    aggregate_type, aggregate_id, event_type, payload = ROWS[request.param]
    with psycopg.connect(database_url, autocommit=True) as connection:
        headers = json.dumps({"traceparent": TRACE, "correlation_id": "c"})
        id, position = connection.execute(
            _APPEND, (aggregate_type, aggregate_id, event_type, json.dumps(payload), headers)
        ).fetchone() or (uuid4(), 0)
        whole, small = connection.execute(_ENVELOPES, (id,)).fetchone() or (b"", b"")
    assert whole == small
    return id, position, bytes(whole)


def a_message(envelopes: list[bytes], retry: bool = False, replay: UUID | None = None) -> bytes:
    return unsigned_message("test", "test.note", "b1", envelopes, retry=retry, replay=replay, sent_in="7 a")


def test_python_finds_everything_where_sql_has_put_it(row: tuple[UUID, int, bytes]) -> None:
    id, position, envelope = row

    assert envelope[EVENT_ID] == str(id).encode()
    assert (found := EVENT_ID_PATTERN.match(envelope)) is not None
    assert found[1] == envelope[EVENT_ID]
    at = envelope.find(TRACEPARENT, TRACEPARENT_FROM, TRACEPARENT_TO)
    assert envelope[at + len(TRACEPARENT) - 3 :].startswith(TRACE.encode())
    assert envelope[at + TRACE_FLAG_AT : at + TRACE_FLAG_AT + 1] == b"1"
    attributes = envelope.partition(BEFORE_DATA)[0]
    assert json.loads(attributes + b"}") == read_head(envelope)
    assert read_head(envelope)["position"] == str(position)
    assert json.loads(payload_of(envelope)) == json.loads(envelope)["data"]


def test_a_message_around_it_is_what_dramatiq_and_our_consumers_read(row: tuple[UUID, int, bytes]) -> None:
    id, position, envelope = row
    replay = uuid4()

    unsigned = a_message([envelope, envelope], retry=True, replay=replay)
    signed = KEY.signed(unsigned)

    assert key_id_of(signed) == KEY.id
    assert signed[:-TAIL_BYTES] == unsigned
    contents = read_bundle(signed)
    assert [(one.event_id, one.position, one.traceparent) for one in contents.envelopes] == 2 * [(id, position, TRACE)]
    assert (contents.handler, contents.queue, contents.id) == ("test.note", "test", "b1")
    assert (contents.retry, contents.replay, contents.sent_in) == (True, replay, "7 a")
    message = Message.decode(signed)
    assert (message.queue_name, message.actor_name, message.message_id) == ("test", "test.note", "b1")
    assert message.options["redis_message_id"] == "b1"


def test_the_relay_finds_the_events_of_first_deliveries_only(row: tuple[UUID, int, bytes]) -> None:
    id, _, envelope = row
    ids = [str(id).encode()]

    assert event_ids_of_first_delivery(a_message([envelope]) + END) == ids
    assert event_ids_of_first_delivery(a_message([envelope], retry=True) + END) == []
    assert event_ids_of_first_delivery(a_message([envelope], replay=uuid4()) + END) == []
    assert EVENT_IDS_PATTERN.findall(a_message([envelope]) + END) == ids


def test_lua_reads_the_same_handler_as_python(row: tuple[UUID, int, bytes], servers: Servers) -> None:
    message = a_message([row[2]]) + END
    (pattern,) = re.findall(r"'(\^\{\"queue_name.*)'\)", (LUA / "move.lua").read_text())
    client = redis.Redis.from_url(servers.redis_url)

    handler = client.eval(f"return string.match(string.sub(ARGV[1], 1, 1000), '{pattern}')", 0, message)

    assert handler == b"test.note"
    assert handler_named_in(message) == "test.note"
