"""Objects of a hostile login with the names and types that functions of ours use; each says when it is called."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import psycopg

Connection = psycopg.Connection[Any]


@contextmanager
def session(url: str, *statements: str) -> Iterator[Connection]:
    """A session whose statements commit each; the test's own look up nothing where traps lie."""
    with psycopg.connect(url, autocommit=True, options="-c search_path=pg_catalog,pg_temp") as connection:
        for statement in statements:
            connection.execute(statement)
        yield connection


def one(connection: Connection, query: str, *parameters: object) -> Any:
    (value,) = connection.execute(query, parameters).fetchone() or (None,)
    return value


# It fails as well, so that a function of ours that calls one cannot hide it.
_SPRING = """
    create function {schema}.spring() returns boolean language plpgsql set search_path = pg_catalog, pg_temp as $$
    begin
        if current_user <> session_user or current_setting('test.armed', true) = 'yes' then
            raise warning 'trapped as %', current_user;
            raise exception 'trapped as %', current_user;
        end if;
        return true;
    end $$;
    grant execute on function {schema}.spring() to public;
"""
# What is looked up among temporary objects: relations and types.
_RELATIONS = ["pg_inherits", "pg_class", "pg_locks", "pg_database", "pg_sequence", "pg_proc", "pg_namespace"]
_TYPES = ["text", "uuid", "bigint", "int8", "int4", "integer", "timestamptz", "record", "jsonb", "regclass", "tid",
          "boolean", "bool", "int8multirange", "int8range", "numeric", "float8", "refcursor"]  # fmt: skip
TEMPORARY = [
    _SPRING.format(schema="pg_temp"),
    *(f"create temporary view {name} as select * from pg_catalog.{name} where pg_temp.spring()" for name in _RELATIONS),
    *(f"grant select on pg_temp.{name} to public" for name in _RELATIONS),
    *(
        f'create domain pg_temp."{name}" as pg_catalog."{name}" check (pg_temp.spring())'
        for name in _TYPES
        if name not in ("record", "bigint", "integer", "boolean")
    ),
]
# What is looked up in a schema that comes first, and what is a better match in one that comes last: functions and
# operators of the very types that ours are called with.
_FUNCTIONS = {
    "now()": "timestamptz",
    "clock_timestamp()": "timestamptz",
    "gen_random_uuid()": "uuid",
    "uuidv7()": "uuid",
    "nextval(regclass)": "bigint",
    "length(text)": "integer",
    "format(text, text)": "text",
    "left(text, integer)": "text",
    "lpad(text, integer, text)": "text",
    "rpad(text, integer, text)": "text",
    "floor(numeric)": "numeric",
    "abs(numeric)": "numeric",
    "abs(double precision)": "double precision",
    "to_hex(bigint)": "text",
    "encode(bytea, text)": "text",
    "uuid_send(uuid)": "bytea",
    "get_byte(bytea, integer)": "integer",
    "to_timestamp(numeric)": "timestamptz",
    "to_timestamp(double precision)": "timestamptz",
    "to_json(text)": "json",
    "to_json(timestamptz)": "json",
    "to_json(timestamp)": "json",
    "to_char(timestamp, text)": "text",
    "to_date(text, text)": "date",
    "date_trunc(text, timestamp)": "timestamp",
    "date_trunc(text, timestamptz)": "timestamptz",
    "pg_column_size(jsonb)": "integer",
    "pg_column_compression(jsonb)": "text",
    "jsonb_typeof(jsonb)": "text",
    "octet_length(text)": "integer",
    "octet_length(bytea)": "integer",
    "quote_ident(text)": "text",
    "hashtext(text)": "integer",
    "unnest(text[])": "setof text",
    "unnest(uuid[])": "setof uuid",
    "unnest(bigint[])": "setof bigint",
    "lower(int8range)": "bigint",
    "upper(int8range)": "bigint",
    "lower(int8multirange)": "bigint",
    "upper(int8multirange)": "bigint",
    "isempty(int8multirange)": "boolean",
    "concat_ws(text, text, text)": "text",
    "convert_to(text, name)": "bytea",
    "to_regclass(text)": "regclass",
    "pg_try_advisory_xact_lock(bigint)": "boolean",
    "pg_try_advisory_xact_lock_shared(bigint)": "boolean",
    "pg_advisory_xact_lock(bigint)": "void",
    "pg_notify(text, text)": "void",
    "set_config(text, text, boolean)": "text",
    "current_setting(text, boolean)": "text",
    "pg_current_xact_id()": "xid8",
}
_COMPARED = ["text", "uuid", "bigint", "integer", "timestamptz", "numeric", "name", "oid"]
_OPERATORS = [
    *((name, kind, kind) for kind in _COMPARED for name in ("=", "<>", "<", ">", "<=", ">=")),
    *((name, "text", "text") for name in ("~", "!~", "||")),
    *((name, "name", "text") for name in ("~", "=", "<=")),
    *((name, "integer", "bigint") for name in ("=", "<", ">")),
    ("<=", "double precision", "numeric"),
    ("->", "jsonb", "text"),
    ("#>", "jsonb", "text[]"),
    (">>", "integer", "integer"),
    ("<<", "bigint", "integer"),
    ("|", "bigint", "bigint"),
    ("&", "bigint", "integer"),
    ("+", "timestamptz", "interval"),
    ("-", "timestamptz", "interval"),
    ("-", "timestamptz", "timestamptz"),
]


def traps_in(schema: str) -> Iterator[str]:
    yield _SPRING.format(schema=schema)
    for signature, returns in _FUNCTIONS.items():
        yield (
            f"create function {schema}.{signature} returns {returns} language plpgsql volatile"
            f" as $$ begin perform {schema}.spring(); return{' next' * returns.startswith('setof')}"
            f"{' null' * (returns != 'void')}; end $$"
        )
    for number, (name, left, right) in enumerate(_OPERATORS):
        returns = "text" if name == "||" else "boolean"
        yield (
            f"create function {schema}.op{number}({left}, {right}) returns {returns} language plpgsql volatile"
            f" as $$ begin perform {schema}.spring(); return null; end $$"
        )
        yield f"create operator {schema}.{name} (leftarg = {left}, rightarg = {right}, function = {schema}.op{number})"


_CALLS = """
    select p.oid::regprocedure::text,
           format('select * from %s(%s)', p.oid::regproc,
                  (select string_agg(format('null::%s', format_type(type, null)), ', ')
                   from unnest(p.proargtypes) type))
    from pg_proc p
    where p.pronamespace = 'dovecote'::regnamespace and has_function_privilege(p.oid, 'execute')
      and p.prorettype <> 'trigger'::regtype and p.proname <> 'append_event'
"""
#: With arguments that get far into the function.
_HONEST = [
    "select * from dovecote.processed_lately(60, 10)",
    "select dovecote.ensure_partitions(4)",
    "select dovecote.lock_partition('2026w01')",
    "select dovecote.copy_misplaced_rows(10)",
    "select dovecote.place_misplaced_rows()",
    "select dovecote.drop_partition('2026w01', 'me')",
    "select dovecote.unsubscribe_handler('nobody', 'me')",
    "select dovecote.uuid_v7_time(dovecote.uuid_v7())",
    "select dovecote.uuid_v7_lower_bound('2026-11-28')",
    "select dovecote.week_monday('2026w01'), dovecote.week_suffix('2026-11-28')",
    "select dovecote.event_name('a.b.v1'), dovecote.release_key('a'), dovecote.writer_key(1)",
    "select dovecote.small_envelope(o), dovecote.envelope(o), dovecote.refusal(o) from dovecote.outbox o limit 1",
    "select * from dovecote.envelopes((select array_agg(id) from dovecote.outbox), 1000)",
    "select * from dovecote.partition_blockers(dovecote.uuid_v7_lower_bound('2026-01-01'),"
    " dovecote.uuid_v7_lower_bound('2027-01-01'))",
    "select dovecote.blocker('a', '{a.b.v1}', 'order', '1', 10)",
    "select * from dovecote.events_in('{[1,100)}', 10)",
    "select * from dovecote.unprocessed('a', 10)",
    "select * from dovecote.not_in_outbox(array[dovecote.uuid_v7()], '{1}', '{a.b.v1}')",
    "select dovecote.json_text_bytes('{\"a\": 1}', 10)",
    "select dovecote.message_bytes(dovecote.uuid_v7())",
]


def trapped(connection: Connection, *settings: str) -> list[str]:
    """Call everything that the login may call in such a session; return what a trap has said."""
    said: list[str] = []
    connection.add_notice_handler(lambda notice: said.append(notice.message_primary or ""))
    calls = connection.execute(_CALLS).fetchall()
    for setting in settings:
        connection.execute(setting)
    assert len(calls) > 5
    for query in chain((query for _, query in calls), _HONEST):
        try:
            with connection.transaction(force_rollback=True):
                connection.execute(query)
        except psycopg.Error as error:
            if "trapped" in str(error):
                said.append(f"{query}: {error}")
    return [one for one in said if "trapped" in one]
