"""A login makes a function of ours run its own code: by temporary objects, or by a schema of its own or public, which
is looked into before Postgres's or has the better match. As the owner of the schema, an operator, or a superuser.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from dovecote.bootstrap import relay_for
from dovecote.migrations import schema
from dovecote.route import Dovecote
from dovecote.store.engines import engine_during
from tests.conftest import Servers, settings_for
from tests.security.traps import TEMPORARY, one, session, trapped, traps_in
from tests.support import commands
from tests.support.effects import a_route, write_quotes
from tests.support.migrations import LOCATIONS
from tests.support.processes import eventually
from tests.support.system import system_for
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

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
    select a.attrelid::regclass::text
    from pg_attribute a join pg_class c on c.oid = a.attrelid, aclexplode(a.attacl) acl
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
      and not (name ~ '^(schema dovecote|(dovecote[.])?dovecote_version(_pkc)?([[][]])?)$'
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
    " create function dovecote.next() returns integer language sql"
    " return shop.f()": "it uses nothing of another schema",
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


# What is called -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["worker", "operator", "viewer", "service", "writer"])
def test_temporary_objects_are_found_by_no_function(urls: Mapping[str, str], role: str) -> None:
    with session(urls["owner"]) as owner:
        one(owner, "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
    with session(urls[role]) as hostile:
        assert trapped(hostile, *TEMPORARY, "set search_path = pg_temp, pg_catalog") == []


@pytest.mark.parametrize("path", ["shop, pg_catalog", '"$user", public'])
@pytest.mark.parametrize("role", ["worker", "operator", "viewer", "service", "owner"])
def test_a_schema_of_a_writer_is_looked_into_by_no_function(
    with_traps: Mapping[str, str], role: str, path: str
) -> None:
    with session(with_traps[role], "set test.armed = 'yes'") as hostile:
        with pytest.raises(psycopg.errors.RaiseException, match="trapped"), hostile.transaction():
            hostile.execute(f"set local search_path = {path}; select to_timestamp(1.5)")  # the traps work

        assert trapped(hostile, f"set search_path = {path}") == []


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
            environment["DOVECOTE_APP"] = "workers.app:app"
            done = commands.run_text(command, {**environment, "DOVECOTE_HOME": str(tmp_path)}, tmp_path)
        finally:
            owner.execute(f'alter database "{database}" reset test.armed')

    assert "trapped" not in done.stdout + done.stderr
    # doctor: no relay runs here.
    assert done.returncode == (1 if command == ["doctor"] else 0), done.stderr


def test_sessions_of_relay_and_commands_have_no_schema_of_others_on_their_path(
    urls: Mapping[str, str], servers: Servers, tmp_path: Path
) -> None:
    settings = settings_for(urls["owner"], servers.redis_url, tmp_path)

    with (
        relay_for(settings, Dovecote(routes=ROUTES))._session() as relay,
        engine_during(settings) as engine,
        engine.connect() as cli,
    ):
        paths = [one(relay, "show search_path"), cli.exec_driver_sql("show search_path").scalar_one()]

    assert {path.replace(" ", "") for path in paths} == {"pg_catalog,pg_temp"}


def test_a_migration_binds_nothing_of_public(empty_database_url: str) -> None:
    with session(empty_database_url) as owner:
        for statement in traps_in("public"):
            with suppress(psycopg.errors.UndefinedObject):
                owner.execute(statement)

    schema.upgrade(empty_database_url, locations=LOCATIONS)

    with session(empty_database_url) as owner:
        assert owner.execute(_KNOWS_OTHERS).fetchall() == []


def test_consumers_and_the_relay_of_a_worker_run_nobody_s_code(
    with_traps: Mapping[str, str], servers: Servers, tmp_path: Path
) -> None:
    database = make_url(with_traps["owner"]).database
    """A handler names a table of its service without a schema, in public: there it is found all the same."""
    with session(with_traps["owner"]) as owner:
        worker = make_url(with_traps["worker"]).username
        owner.execute("create table public.effects (handler text, event_id uuid, symbol text, price integer)")
        owner.execute(f'grant insert on public.effects to "{worker}"')
        owner.execute(f"alter database \"{database}\" set test.armed = 'yes'")
        try:
            settings = settings_for(with_traps["worker"], servers.redis_url, tmp_path)
            with system_for(settings, [a_route()]) as system, system.running():
                write_quotes(system, range(3))
                eventually(lambda: one(owner, "select count(*) from public.effects") == 3, 15, "three effects")
        finally:
            owner.execute(f'alter database "{database}" reset test.armed')
