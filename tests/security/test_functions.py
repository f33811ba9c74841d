"""A login makes a function of ours run its own code, or mean something else: by temporary objects, by a schema of its
own or public before Postgres's, by settings of its session. As the owner of the schema, an operator, or a superuser.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson
import psycopg
import pytest
from sqlalchemy import make_url

from tests import commands
from tests.conftest import Servers, settings_for
from tests.logins import logins
from tests.past_the_trigger import insert_past_the_trigger
from workers.bootstrap import engine_during, relay_for
from workers.relay.bundles import EVENT_ID
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

Connection = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def urls(database_url: str) -> Iterator[Mapping[str, str]]:
    with logins(database_url) as urls:
        yield urls


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


# What is demanded of every function, also of the next one ----------------------------------------

_LOOKS_NAMES_UP = """
    select p.oid::regprocedure::text from pg_proc p
    where p.pronamespace = 'dovecote'::regnamespace and p.prosqlbody is null
      and not exists (select from unnest(p.proconfig) setting
                      where setting ~ '^search_path=pg_catalog, (dovecote, )?pg_temp$')
"""
_KNOWS_OTHERS = """
    select pg_describe_object(d.classid, d.objid, 0) || ' uses ' || pg_describe_object(d.refclassid, d.refobjid, 0)
    from pg_depend d, pg_identify_object(d.refclassid, d.refobjid, 0) other
    where d.deptype = 'n' and other.schema not in ('dovecote', 'pg_catalog')
      and (d.classid, d.objid) in (
          select 'pg_proc'::regclass, oid from pg_proc where pronamespace = 'dovecote'::regnamespace
          union all select 'pg_attrdef'::regclass, a.oid from pg_attrdef a join pg_class c on c.oid = a.adrelid
                    where c.relnamespace = 'dovecote'::regnamespace
          union all select 'pg_constraint'::regclass, oid from pg_constraint
                    where connamespace = 'dovecote'::regnamespace
          union all select 'pg_rewrite'::regclass, r.oid from pg_rewrite r join pg_class c on c.oid = r.ev_class
                    where c.relnamespace = 'dovecote'::regnamespace)
"""
_FOR_EVERYBODY = """
    select p.oid::regprocedure::text from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) acl
    where p.pronamespace = 'dovecote'::regnamespace and acl.grantee = 0
    union all
    select c.oid::regclass::text from pg_class c, aclexplode(c.relacl) acl
    where c.relnamespace = 'dovecote'::regnamespace and acl.grantee = 0
    union all
    select a.attrelid::regclass::text from pg_attribute a join pg_class c on c.oid = a.attrelid, aclexplode(a.attacl) acl
    where c.relnamespace = 'dovecote'::regnamespace and acl.grantee = 0
    union all
    select 'schema ' || n.nspname from pg_namespace n, aclexplode(n.nspacl) acl
    where n.nspname = 'dovecote' and acl.grantee = 0
"""
# The schema and Alembic's table are the migrating login's, which is the owner's member.
_OWNED_BY_OTHERS = """
    with ours (name, owner) as (
        select c.oid::regclass::text, c.relowner from pg_class c where c.relnamespace = 'dovecote'::regnamespace
        union all select p.oid::regprocedure::text, p.proowner from pg_proc p
                  where p.pronamespace = 'dovecote'::regnamespace
        union all select format_type(t.oid, null), t.typowner from pg_type t
                  where t.typnamespace = 'dovecote'::regnamespace
        union all select o.oid::regoperator::text, o.oprowner from pg_operator o
                  where o.oprnamespace = 'dovecote'::regnamespace
        union all select 'schema dovecote', nspowner from pg_namespace where nspname = 'dovecote'
    )
    select name from ours
    where owner <> 'dovecote_owner'::regrole
      and not (name ~ '^(schema dovecote|(dovecote[.])?alembic_version(_pkc)?([[][]])?)$'
               and pg_has_role(owner, 'dovecote_owner', 'member'))
"""
_DEMANDS = {
    "its names are its own": _LOOKS_NAMES_UP,
    "it uses nothing of another schema": _KNOWS_OTHERS,
    "it is not for everybody": _FOR_EVERYBODY,
    "it is the owner's": _OWNED_BY_OTHERS,
}


@pytest.mark.parametrize("demand", _DEMANDS)
def test_of_everything_in_our_schema(urls: Mapping[str, str], demand: str) -> None:
    with session(urls["owner"]) as owner:
        assert owner.execute(_DEMANDS[demand]).fetchall() == []


_NEXT = {
    "create function dovecote.next() returns integer language sql as 'select 1'": "its names are its own",
    "create function dovecote.next() returns integer language plpgsql security definer"
    " set search_path = pg_catalog, dovecote as 'begin return 1; end'": "its names are its own",
    "create function dovecote.next() returns integer language plpgsql set search_path = pg_temp, pg_catalog"
    " as 'begin return 1; end'": "its names are its own",
    "create function shop.f() returns integer language sql return 1;"
    " create function dovecote.next() returns integer language sql return shop.f()": "it uses nothing of another schema",
    "create function shop.f() returns integer language sql return 1;"
    " create table dovecote.next (n integer default shop.f())": "it uses nothing of another schema",
    "reset role; create function dovecote.next() returns integer language sql return 1": "it is the owner's",
    "create view dovecote.next as select 1; grant select on dovecote.next to public": "it is not for everybody",
    "create function dovecote.next() returns integer language sql return 1;"
    " grant execute on function dovecote.next to public": "it is not for everybody",
}


@pytest.mark.parametrize("statements", _NEXT)
def test_the_next_one_is_found(urls: Mapping[str, str], statements: str) -> None:
    with session(urls["owner"]) as owner, owner.transaction(force_rollback=True):
        owner.execute("grant all on schema shop to dovecote_owner; set local role dovecote_owner")
        owner.execute(statements)

        found = {demand: owner.execute(query).fetchall() for demand, query in _DEMANDS.items()}

    assert found[_NEXT[statements]]


def test_the_next_function_of_the_owner_is_not_for_everybody(urls: Mapping[str, str]) -> None:
    with session(urls["owner"]) as owner, owner.transaction(force_rollback=True):
        owner.execute("set local role dovecote_owner")
        owner.execute("create function dovecote.next() returns integer language sql return 1")

        assert one(owner, "select has_function_privilege('public', 'dovecote.next()', 'execute')") is False


# Traps -------------------------------------------------------------------------------------------
# Each says so, and fails: a function of ours that calls one cannot hide it.

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
    "select dovecote.hold_week('2026w01')",
    "select dovecote.copy_strays(10)",
    "select dovecote.place_strays()",
    "select dovecote.drop_week('2026w01', 'me')",
    "select dovecote.forget_handler('nobody', 'me')",
    "select dovecote.uuid_v7_time(dovecote.uuid_v7())",
    "select dovecote.uuid_v7_floor('2026-11-28')",
    "select dovecote.week_monday('2026w01'), dovecote.week_suffix('2026-11-28')",
    "select dovecote.fact_of('a.b.v1'), dovecote.release_key('a'), dovecote.floor_key(1)",
    "select dovecote.small_envelope(o), dovecote.envelope(o), dovecote.refusal(o) from dovecote.outbox o limit 1",
    "select * from dovecote.envelopes((select array_agg(id) from dovecote.outbox), 1000)",
    "select * from dovecote.week_obstacles(dovecote.uuid_v7_floor('2026-01-01'), dovecote.uuid_v7_floor('2027-01-01'))",
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
    connection.add_notice_handler(lambda told: said.append(told.message_primary or ""))
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


@pytest.mark.parametrize("role", ["worker", "operator", "viewer", "service", "writer"])
def test_temporary_objects_are_found_by_no_function(urls: Mapping[str, str], role: str) -> None:
    with session(urls["owner"]) as owner:
        one(owner, "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
    with session(urls[role]) as hostile:
        assert trapped(hostile, *TEMPORARY, "set search_path = pg_temp, pg_catalog") == []


@pytest.fixture(scope="module")
def with_traps(urls: Mapping[str, str]) -> Mapping[str, str]:
    """The writer's traps lie in its own schema, and in public, where it may create something, as up to Postgres 14."""
    with session(urls["owner"]) as owner:
        writer = make_url(urls["writer"]).username
        owner.execute(f'grant create on schema public to "{writer}"; grant usage on schema shop to public')
        one(owner, "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
    with session(urls["writer"]) as writer_session:
        for statement in chain(traps_in("shop"), traps_in("public")):
            with suppress(psycopg.errors.UndefinedObject):
                writer_session.execute(statement)
    return urls


@pytest.mark.parametrize("path", ["shop, pg_catalog", '"$user", public'])
@pytest.mark.parametrize("role", ["worker", "operator", "viewer", "service", "owner"])
def test_a_schema_of_a_writer_is_looked_into_by_no_function(
    with_traps: Mapping[str, str], role: str, path: str
) -> None:
    with session(with_traps[role], "set test.armed = 'yes'") as hostile:
        path = f"set local search_path = {path}"
        with pytest.raises(psycopg.errors.RaiseException, match="trapped"), hostile.transaction():
            hostile.execute(path)
            hostile.execute("select to_timestamp(1.5)")  # the traps work

        assert trapped(hostile, path.replace("local ", "")) == []


@pytest.mark.parametrize(
    "command", [["status"], ["events", "list"], ["deliveries", "list"], ["partitions"], ["doctor"], ["audit"]]
)
def test_a_command_of_a_superuser_runs_nobody_s_code(
    with_traps: Mapping[str, str], servers: Servers, tmp_path: Path, command: list[str]
) -> None:
    database = make_url(with_traps["owner"]).database
    with session(with_traps["owner"]) as owner:
        owner.execute(f"alter database \"{database}\" set test.armed = 'yes'")
        try:
            environment = {"DATABASE_URL": with_traps["owner"], "REDIS_URL": servers.redis_url}
            done = commands.run_text(command, {**environment, "DOVECOTE_HOME": str(tmp_path)}, tmp_path)
        finally:
            owner.execute(f'alter database "{database}" reset test.armed')

    assert "trapped" not in done.stdout + done.stderr
    # doctor: no relay is at work here.
    assert done.returncode == (1 if command == ["doctor"] else 0), done.stderr


def test_sessions_of_relay_and_commands_have_no_schema_of_others_on_their_path(
    urls: Mapping[str, str], servers: Servers, tmp_path: Path
) -> None:
    settings = settings_for(urls["owner"], servers.redis_url, tmp_path)

    with relay_for(settings, ROUTES)._session() as relay, engine_during(settings) as engine, engine.connect() as cli:
        paths = [one(relay, "show search_path"), cli.exec_driver_sql("show search_path").scalar_one()]

    assert {path.replace(" ", "") for path in paths} == {"pg_catalog,pg_temp"}


def test_a_migration_binds_nothing_of_public(empty_database_url: str) -> None:
    from workers import schema

    with session(empty_database_url) as owner:
        for statement in traps_in("public"):
            with suppress(psycopg.errors.UndefinedObject):
                owner.execute(statement)

    schema.upgrade(empty_database_url)

    with session(empty_database_url) as owner:
        assert owner.execute(_KNOWS_OTHERS).fetchall() == []


# The same row, the same words, the same envelope --------------------------------------------------

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
_ID = "overlay(dovecote.uuid_v7_floor('2026-11-28T12:00:00Z')::text placing '7' from 15 for 1)::uuid"
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
        '"subject":"Zürich \\"1\\"","time":"2026-11-28T10:00:00.12+00:00","dataschema":"urn:dovecote:shop.order_placed.v1",'
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
def test_moment_and_position_are_the_server_s(
    urls: Mapping[str, str], role: str, verb: str, column: str, value: str
) -> None:
    names = ", ".join([*_COLUMNS, column])
    with session(urls[role]) as writer, pytest.raises(psycopg.errors.InsufficientPrivilege):
        if verb == "insert":
            writer.execute(f"insert into dovecote.outbox ({names}) values ({', '.join(_COLUMNS.values())}, '{value}')")
        else:
            writer.execute(f"copy dovecote.outbox ({names}) from stdin")


@pytest.mark.parametrize("role", ["writer", "worker", "service"])
def test_a_writer_writes_each_other_column(urls: Mapping[str, str], role: str) -> None:
    with session(urls[role]) as writer, writer.transaction(force_rollback=True):
        writer.execute(_WRITE, (one(writer, "select dovecote.uuid_v7()"),))
        last = one(writer, "select last_value from dovecote.outbox_position")
        floors = writer.execute(
            "select ((classid::bigint & 65535) << 32) | objid::bigint from pg_locks"
            " where locktype = 'advisory' and classid::bigint >> 16 = 17602 and pid = pg_backend_pid()"
        ).fetchall()

        assert floors == [(last - 1,)], "announced once, at what was the last position"


# Arguments have bounds, and no lock is taken for nothing -------------------------------------------

_OUT_OF_BOUNDS = {
    "ensure_partitions(400)": "0 to 60 weeks ahead, not for 400",
    "ensure_partitions(-1)": "0 to 60 weeks ahead, not for -1",
    "ensure_partitions(null)": "0 to 60 weeks ahead, not for null",
    "hold_week(null)": "no partition for week null",
    "hold_week('../etc')": "no partition for week",
    "hold_week('2026w99')": "no partition for week",
    "hold_week('9999w01')": "no partition for week",
    "drop_week(null, 'me')": "no partition for week null",
    "drop_week('2026w01', null)": "who drops a week",
    "drop_week('2026w01', repeat('x', 201))": "who drops a week",
    "drop_week('2026w01', E'a\\nb')": "who drops a week",
    "drop_week('2026w01', 'me', repeat('x', 1001), repeat('a', 64), 1, 1)": "1 to 1000 characters",
    "drop_week('2026w01', 'me', E'/x\\x1b[2J', repeat('a', 64), 1, 1)": "no control characters",
    "drop_week('2026w01', 'me', '/x', null, 1, 1)": "64 hex digits",
    "drop_week('2026w01', 'me', null, repeat('a', 64), 1, 1)": "64 hex digits",
    "drop_week('2026w01', 'me', '/x', 'not it', 1, 1)": "64 hex digits",
    "drop_week('2026w01', 'me', '/x', repeat('a', 64))": "the numbers of its rows",
    "copy_strays(0)": "1 to 100000 rows",
    "copy_strays(2147483647)": "1 to 100000 rows",
    "copy_strays(null)": "1 to 100000 rows",
    "processed_lately(0)": "1 to 86400 seconds",
    "processed_lately(null)": "1 to 86400 seconds",
    "processed_lately(60, 2147483647)": "1 to 10000 pages",
    "processed_lately(60, -1)": "1 to 10000 pages",
}


@pytest.mark.parametrize("call", _OUT_OF_BOUNDS)
def test_an_argument_out_of_bounds_is_refused_in_words(urls: Mapping[str, str], call: str) -> None:
    with session(urls["operator"]) as operator, pytest.raises(psycopg.Error) as caught:
        operator.execute(f"select dovecote.{call}")

    assert _OUT_OF_BOUNDS[call] in str(caught.value)


@pytest.mark.parametrize("role", ["operator", "worker"])
@pytest.mark.parametrize("verb", ["hold_week('{week}')", "drop_week('{week}', 'me')", "recover_sequence()",
                                  "ensure_partitions(4)", "place_strays()", "processed_lately(60)"])  # fmt: skip
def test_nobody_stops_writers_by_leaving_a_call_open(urls: Mapping[str, str], role: str, verb: str) -> None:
    with session(urls["owner"]) as owner:
        week = one(owner, "select dovecote.week_suffix(now())")
    with session(urls[role]) as hostile, session(urls["writer"], "set lock_timeout = '1s'") as writer:
        hostile.execute("begin; savepoint before")
        try:
            hostile.execute(f"select dovecote.{verb.format(week=week)}")
        except psycopg.Error as error:
            assert "too young" in str(error)
            # Not undone with the error: the savepoint keeps whatever lock came before it.
            hostile.execute("rollback to before")

        one(writer, "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
        locked = one(
            hostile,
            "select count(*) from pg_locks"
            " where pid = pg_backend_pid() and locktype = 'relation' and mode <> 'AccessShareLock'",
        )
        assert locked == 0


@pytest.mark.parametrize(
    "setting", ["set timezone = 'Europe/Berlin'", "set timezone = 'Asia/Kolkata'; set datestyle = 'SQL, DMY'"]
)
def test_weeks_begin_on_monday_in_utc_whoever_makes_them(fresh_database_url: str, setting: str) -> None:
    bounds = """
        select c.relname, pg_get_expr(c.relpartbound, c.oid) from pg_class c
        where c.relispartition and c.relkind = 'r' and c.relname ~ '^published' order by 1
    """
    made: list[list[Any]] = []
    with session(fresh_database_url, setting) as hostile, session(fresh_database_url, "set timezone = 'UTC'") as plain:
        for connection in (hostile, plain):
            with connection.transaction(force_rollback=True):
                connection.execute("select dovecote.ensure_partitions(30)")
                connection.execute("set local timezone = 'UTC'; set local datestyle = 'ISO'")
                made.append(connection.execute(bounds).fetchall())

    assert len(made[0]) == 33
    assert made[0] == made[1]
