"""A writer, or who reads, has settings, a path or objects by which an event becomes another one, or is taken although
it is to be refused.
"""

from collections.abc import Mapping
from uuid import UUID

import orjson
import psycopg
import pytest

from dovecote.envelope.wire import EVENT_ID
from tests.security.traps import Connection, one, session
from tests.support.past_the_trigger import insert_past_the_trigger

pytestmark = pytest.mark.servers

HOSTILE = [
    "set search_path = shop, pg_catalog, dovecote",
    "set search_path = pg_temp, shop, public, pg_catalog",
    "set timezone = 'Asia/Kolkata'",
    "set timezone = 'Europe/Berlin'; set datestyle = 'SQL, DMY'",
    "set datestyle = 'German, DMY'; set intervalstyle = 'sql_standard'",
    "set bytea_output = 'escape'",
    "set extra_float_digits = -15",
    "set quote_all_identifiers = on",
    "set standard_conforming_strings = off; set backslash_quote = off",
    "set transform_null_equals = on",
    "set array_nulls = off",
    "set client_encoding = 'LATIN1'",
    "set default_transaction_isolation = 'serializable'",
    "set plpgsql.extra_errors = 'all'",
    "set xmloption = 'document'; set row_security = off",
    "set lc_numeric = 'C'; set lc_time = 'C'; set lc_monetary = 'C'",
    "set jit = on; set jit_above_cost = 0; set enable_indexscan = off",
    "set constraint_exclusion = on; set plan_cache_mode = 'force_generic_plan'",
]
_WRITE = """
    insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers)
    values (%s, 'order', 'Zürich "1"', 'shop.order_placed.v1', '{"price": 1.10, "text": "\\u00fc"}',
            '{"traceparent": "00-a", "correlation_id": "c"}')
"""
_ROW = "select to_jsonb(o) - '{position,created_at}'::text[] from dovecote.outbox o where id = %s"
#: What is wrong with it, and how it is written.
_REFUSED = {
    "an old id": "select '00000000-0000-7000-8000-000000000000', 'order', '1', 'a.b.v1', '{}', '{}'",
    "a random id": "select '00000000-0000-4000-8000-000000000000', 'order', '1', 'a.b.v1', '{}', '{}'",
    "a quote in the type": "select dovecote.uuid_v7(), 'order\",\"id\":\"', '1', 'a.b.v1', '{}', '{}'",
    "no type": "select dovecote.uuid_v7(), null, '1', 'a.b.v1', '{}', '{}'",
    "a long id": "select dovecote.uuid_v7(), 'order', pg_catalog.repeat('x', 201), 'a.b.v1', '{}', '{}'",
    "no version": "select dovecote.uuid_v7(), 'order', '1', 'a.b', '{}', '{}'",
    "no object": "select dovecote.uuid_v7(), 'order', '1', 'a.b.v1', '[]', '{}'",
    "a large one": "select dovecote.uuid_v7(), 'order', '1', 'a.b.v1',"
    " pg_catalog.jsonb_build_object('a', pg_catalog.repeat('x', 300000)), '{}'",
    "large headers": "select dovecote.uuid_v7(), 'order', '1', 'a.b.v1', '{}',"
    " pg_catalog.jsonb_build_object('a', pg_catalog.repeat('x', 20000))",
}


def refusals(writer: Connection) -> dict[str, str]:
    said = {}
    for name, values in _REFUSED.items():
        with pytest.raises(psycopg.errors.CheckViolation) as caught, writer.transaction():
            writer.execute(
                "insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers) " + values
            )
        said[name] = caught.value.diag.message_primary or ""
    return said


def written(urls: Mapping[str, str], setting: str, id: UUID) -> tuple[object, ...]:
    """Write one event in such a session, and read it in another: the row, its envelopes, the refusals of others."""
    with session(urls["writer"]) as writer, session(urls["worker"]) as worker, session(urls["owner"]) as owner:
        if "search_path" in setting:  # the writer's traps are armed and return nothing worth having
            writer.execute("set test.armed = 'yes'")
        writer.execute(setting)
        writer.execute(_WRITE, (id,))
        words = refusals(writer)
        owner.execute(
            "update dovecote.outbox set created_at = '2026-11-28T12:00:00.12+02', position = 7 where id = %s", (id,)
        )
        row = one(owner, _ROW, id)
        worker.execute(setting)
        envelopes = [
            one(
                worker,
                f"select pg_catalog.convert_to({call}, 'UTF8') from dovecote.outbox o"
                " where o.id operator(pg_catalog.=) %s::pg_catalog.uuid",
                id,
            )
            for call in ("dovecote.envelope(o)", "coalesce(dovecote.small_envelope(o), dovecote.envelope(o))")
        ]
        envelopes.append(one(worker, "select envelope from dovecote.envelopes(array[%s::pg_catalog.uuid], 1000)", id))
        owner.execute("delete from dovecote.outbox where id = %s", (id,))
    return row, *envelopes, words


@pytest.fixture(scope="module")
def plain(with_traps: Mapping[str, str]) -> tuple[UUID, tuple[object, ...]]:
    with session(with_traps["owner"]) as owner:
        id = one(owner, "select dovecote.uuid_v7()")
    return id, written(with_traps, "select", id)


@pytest.mark.parametrize("setting", HOSTILE)
def test_an_event_is_the_same_whatever_its_writer_s_session_says(
    with_traps: Mapping[str, str], plain: tuple[UUID, tuple[object, ...]], setting: str
) -> None:
    id, expected = plain

    assert written(with_traps, setting, id) == expected


def test_the_plain_envelope_is_what_it_always_was(plain: tuple[UUID, tuple[object, ...]]) -> None:
    id, (_, envelope, small, one_by_one, _) = plain

    assert envelope == small == one_by_one
    assert bytes(envelope).decode() == (  # type: ignore[call-overload] # a row's columns
        f'{{"specversion":"1.0","id":"{id}","source":"/dovecote/order","type":"shop.order_placed.v1",'
        '"subject":"Zürich \\"1\\"","time":"2026-11-28T10:00:00.12+00:00",'
        '"dataschema":"urn:dovecote:shop.order_placed.v1",'
        '"position":"7","traceparent":"00-a","correlationid":"c","data":{"text": "ü", "price": 1.10}}'
    )
    assert bytes(envelope)[EVENT_ID] == str(id).encode()  # type: ignore[call-overload] # a row's columns


@pytest.mark.parametrize(
    "hostile", ['x","id":"019ac000-0000-7000-8000-000000000001","y":"', 'x"\n', "\\", "\x1b[2J\u202e"]
)
def test_an_envelope_escapes_each_field_whatever_let_the_row_in(urls: Mapping[str, str], hostile: str) -> None:
    with session(urls["owner"]) as owner:
        position = insert_past_the_trigger(
            owner, "{}", aggregate_type=hostile, aggregate_id=hostile, event_type=hostile,
            headers=orjson.dumps({"traceparent": hostile, "tracestate": hostile, "correlation_id": hostile}).decode(),
        )  # fmt: skip
        id, envelope = owner.execute(
            "select id, dovecote.envelope(o) from dovecote.outbox o where position = %s", (position,)
        ).fetchone() or (None, "")
        owner.execute("delete from dovecote.outbox where position = %s", (position,))

    read = orjson.loads(envelope)
    assert envelope.count('"id":') == 1 + hostile.count("\0")
    assert (read["id"], read["position"]) == (str(id), str(position))
    assert (read["source"], read["type"]) == (f"/dovecote/{hostile}", hostile)
    assert read["dataschema"] == f"urn:dovecote:{hostile}"
    assert {read[name] for name in ("subject", "traceparent", "tracestate", "correlationid")} == {hostile}


# Writers say nothing that is the server's to say --------------------------------------------------

_COLUMNS = {"aggregate_type": "'a'", "aggregate_id": "'b'", "event_type": "'a.b.v1'", "payload": "'{}'"}


@pytest.mark.parametrize("role", ["writer", "worker", "service"])
@pytest.mark.parametrize("verb", ["insert", "copy"])
@pytest.mark.parametrize(
    ("column", "value"), [("created_at", "1970-01-01"), ("created_at", "infinity"), ("position", "1")]
)
def test_time_and_position_are_the_server_s(
    urls: Mapping[str, str], role: str, verb: str, column: str, value: str
) -> None:
    names = ", ".join([*_COLUMNS, column])
    statement = {
        "insert": f"insert into dovecote.outbox ({names}) values ({', '.join(_COLUMNS.values())}, '{value}')",
        "copy": f"copy dovecote.outbox ({names}) from stdin",
    }
    with session(urls[role]) as writer, pytest.raises(psycopg.errors.InsufficientPrivilege):
        writer.execute(statement[verb])


@pytest.mark.parametrize("role", ["writer", "worker", "service"])
def test_a_writer_writes_each_other_column(urls: Mapping[str, str], role: str) -> None:
    with session(urls[role]) as writer, writer.transaction(force_rollback=True):
        writer.execute(_WRITE, (one(writer, "select dovecote.uuid_v7()"),))
        last = one(writer, "select last_value from dovecote.outbox_position")
        keys = writer.execute(
            "select ((classid::bigint & 65535) << 32) | objid::bigint from pg_locks"
            " where locktype = 'advisory' and classid::bigint >> 16 = 17602 and pid = pg_backend_pid()"
        ).fetchall()

        assert keys == [(last - 1,)], "announced once, at what was the last position"
