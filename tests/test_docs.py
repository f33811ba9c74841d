"""Every example on every page is run: against a real database, a real relay, and real processes where it has them."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy import make_url

from dovecote.local.binaries import find_postgres
from dovecote.local.supervisor import parse_procfile
from tests.conftest import Servers
from tests.support.pages import PAGES, ROOT, Page
from tests.support.processes import eventually

README = Page("README.md")
WRITING = Page("docs/guides/writing-events.md")
HANDLERS = Page("docs/guides/handlers.md")
VERSIONS = Page("docs/guides/versions.md")
DEPLOYMENT = Page("docs/operations/deployment.md")
BACKUP = Page("docs/operations/backup-and-failover.md")

# What the tests of this file run. Lines of commands alone, indented or generated, are held against the commands that
# exist (test_pages.py).
RUN = {
    "README.md": Counter(python=1, text=1, sh=1),
    "docs/guides/writing-events.md": Counter(python=5, sql=1),
    "docs/guides/handlers.md": Counter(python=3),
    "docs/guides/versions.md": Counter(python=1),
    "docs/operations/deployment.md": Counter(sql=1),
    "docs/operations/backup-and-failover.md": Counter(sh=4, sql=1),
}

TABLES = """
create table orders (id text primary key, total_cents bigint not null);
create table orders_by_day (day date primary key, orders integer not null);
"""


@pytest.mark.parametrize("page", PAGES, ids=repr)
def test_every_example_of_a_page_is_run(page: Page) -> None:
    if page.name == "docs/reference/cli.md":
        assert {language for language, _ in page.examples()} == {"sh"}
    else:
        assert Counter(language for language, _ in page.examples()) == RUN.get(page.name, Counter())


def run_as_a_program(place: Path, program: str, **variables: str) -> str:
    """Run it in a process of its own: a class of an event is known to a whole process."""
    (place / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        env={
            "PATH": os.environ["PATH"],
            "DOVECOTE_APP": "workers.app:app",
            "PYTHONPATH": str(ROOT),
            "DOVECOTE_HOME": str(place),
            **variables,
        },
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def shop(fresh_database_url: str) -> Any:
    """The service of the examples has tables of its own."""
    with psycopg.connect(fresh_database_url, autocommit=True) as connection:
        connection.execute(TABLES)
        yield connection


def orders_and_events(shop: psycopg.Connection[TupleRow]) -> list[TupleRow]:
    return shop.execute(
        """
        select o.id, e.event_type, e.aggregate_type, e.payload ->> 'order_id', e.payload -> 'total' ->> 'amount_minor'
        from orders o join dovecote.outbox e on e.aggregate_id = o.id
        where o.total_cents::text = e.payload -> 'total' ->> 'amount_minor'
        order by e.position
        """
    ).fetchall()


# The front door ----------------------------------------------------------------------------------


def test_the_application_of_the_readme_runs_as_it_is_shown(
    empty_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    (shop,), (procfile,), (shown,) = (README.blocks(language) for language in ("python", "text", "sh"))
    (tmp_path / "shop.py").write_text(shop)
    (tmp_path / "Procfile").write_text(procfile)
    exports, up, *others = (line for line in shown.splitlines() if line)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DOVECOTE_HOME": str(tmp_path / "state"),
        "DOVECOTE_REDIS__NAMESPACE": f"test-{uuid4().hex[:8]}",
        "DATABASE_URL": empty_database_url,
        "REDIS_URL": servers.redis_url,
        # Where it is not installed, as in a clone that is tested with another's environment, it is in the checkout.
        **dict(word.split("=") for word in exports.replace("$PWD", f"{tmp_path}:{ROOT}").split()[1:]),
    }

    running = subprocess.Popen(shlex.split(up), env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        assert any("is running" in line for line in running.stdout)
        subprocess.run(
            ["/bin/sh", "-e", "-c", "\n".join(others)], env=environment, cwd=tmp_path, check=True, timeout=60
        )
        with psycopg.connect(empty_database_url, autocommit=True) as connection:
            counted = "select orders from public.orders_by_day"
            eventually(lambda: connection.execute(counted).fetchall() == [(1,)], 30, "the order is counted")
    finally:
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 0


# Guides ------------------------------------------------------------------------------------------


AGREE_ON_A_SALARY = """
from dovecote.events import read_event
from tests.support.keys import KEYS

KEYRING = Keyring.parse(
    **{name: KEYS[f"DOVECOTE_PRIVACY__{name.upper()}"] for name in ("hash_key", "encryption_keys", "code_key")}
)
agree(KEYRING, "17", Decimal("4200.00"))
with sessions() as session:
    row = session.execute(text("select id, payload from dovecote.outbox where aggregate_type = 'employee'")).one()
    print(repr(read_event("staff.salary_agreed.v1", row.id, row.payload, KEYRING).salary))
"""


def test_each_way_to_write_from_python_commits_an_order_and_its_event(
    shop: psycopg.Connection[TupleRow], fresh_database_url: str, tmp_path: Path
) -> None:
    ways = WRITING.blocks("python")

    printed = run_as_a_program(tmp_path, "\n\n".join([*ways, AGREE_ON_A_SALARY]), DATABASE_URL=fresh_database_url)

    assert printed == "Decimal('4200.00')\n"
    stored = shop.execute("select payload ->> 'salary' from dovecote.outbox where aggregate_type = 'employee'")
    assert "4200" not in str(stored.fetchall())
    assert orders_and_events(shop) == [
        ("4711", "shop.order_placed.v1", "order", "4711", "1999"),
        ("4712", "shop.order_placed.v1", "order", "4712", "500"),
        ("4713", "shop.order_placed.v1", "order", "4713", "250"),
        ("4716", "shop.order_placed.v1", "order", "4716", "700"),
    ]


@pytest.mark.servers
def test_the_way_to_write_from_any_other_language_does_the_same(
    shop: psycopg.Connection[TupleRow], tmp_path: Path
) -> None:
    (statements,) = WRITING.blocks("sql")

    shop.execute(statements)

    assert orders_and_events(shop) == [("4714", "shop.order_placed.v1", "order", "4714", "100")]
    row = shop.execute("select headers from dovecote.outbox").fetchone()
    assert row == ({"correlation_id": "request-17"},)


RUN_THE_HANDLER = """
from dovecote.route import Route

ROUTES = (
{route}
)

from pathlib import Path
from tests.conftest import settings_for
from tests.support.system import system_for

settings = settings_for(os.environ["DATABASE_URL"], os.environ["REDIS_URL"], Path.cwd())
with system_for(settings, ROUTES) as system, system.relay(), system.workers():
    from tests.support.processes import eventually
    eventually(lambda: "shop.count_orders" in registered(), 10, "the handler registered")
    place_order_in_a_session("4715")
    system.until_quiet()
    print(system.status().handlers["shop.count_orders"].processed)
"""

CAREFUL = "+ (Route(handler='shop.keep', events=(OrderPlaced,), function=on_order_placed_once, queue='billing'),)"

HELPERS = """
def registered():
    with sessions() as session:
        return list(session.execute(text("select handler_name from dovecote.subscriptions")).scalars())

def place_order_in_a_session(order_id):
    with sessions() as session, session.begin():
        place_order(session, order_id, 1)
"""


def test_the_handler_of_the_guide_handles_the_event_of_the_guide(
    shop: psycopg.Connection[TupleRow], fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    function, route, careful = HANDLERS.blocks("python")
    writing = "\n\n".join(WRITING.blocks("python")[:2])
    program = "\n\n".join([writing, function, careful, HELPERS, RUN_THE_HANDLER.format(route=route + CAREFUL)])

    printed = run_as_a_program(tmp_path, program, DATABASE_URL=fresh_database_url, REDIS_URL=servers.redis_url)

    # Those of the first two examples were written before, but no relay had published them yet.
    assert "3" in printed.splitlines()
    assert shop.execute("select sum(orders) from orders_by_day").fetchall() == [(3,)]
    # Each order was there already, which the other handler catches in a savepoint.
    kept = "select count(*) from dovecote.processed_events where handler_name = 'shop.keep'"
    assert shop.execute(kept).fetchall() == [(3,)]
    assert shop.execute("select * from dovecote.deliveries").fetchall() == []


def test_the_queue_of_the_example_is_one_that_the_procfile_serves() -> None:
    _, route, _ = HANDLERS.blocks("python")
    (queue,) = re.findall(r'queue="(\w+)"', route)

    commands = parse_procfile((ROOT / "Procfile").read_text(encoding="utf-8"))
    assert any(
        queue in command[command.index("--queues") + 1 :] for command in commands.values() if "--queues" in command
    )


UPCAST = """
from dovecote.events import upcast

print(upcast("shop.order_placed.v1", {"order_id": "4711"}))
"""


def test_the_upcaster_of_the_guide_reads_the_older_version(tmp_path: Path) -> None:
    (upcaster,) = VERSIONS.blocks("python")

    printed = run_as_a_program(tmp_path, upcaster + UPCAST)

    assert printed == "('shop.order_placed.v2', {'order_id': '4711', 'channel': 'web'})\n"


@pytest.mark.servers
def test_a_login_with_the_writers_role_appends_and_does_nothing_else(
    shop: psycopg.Connection[TupleRow],
) -> None:
    (grant,) = DEPLOYMENT.blocks("sql")
    call = "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')"

    with shop.transaction(force_rollback=True):
        shop.execute("create role shop login")
        shop.execute(grant)
        shop.execute("set role shop")
        written = shop.execute(call).fetchone()
        for forbidden in ("select from dovecote.outbox", "delete from dovecote.outbox", "table dovecote.deliveries"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege), shop.transaction():
                shop.execute(forbidden)

    assert written


# Backup ------------------------------------------------------------------------------------------

POSTGRES = find_postgres(os.environ).path.parent


@pytest.mark.skipif(not (POSTGRES / "pg_dump").exists(), reason="these programs of Postgres cannot dump")
@pytest.mark.servers
def test_each_way_to_restore_that_the_page_shows_gives_a_system_that_goes_on(
    fresh_database_url: str, empty_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    dump, restore, data_only, _ = BACKUP.blocks("sh")
    migrated = f"{make_url(fresh_database_url).database}_migrated"
    outbox = "select position from dovecote.outbox order by position"

    def shell(script: str, url: str) -> None:
        subprocess.run(
            ["/bin/sh", "-e", "-c", script],
            env={
                "PATH": f"{POSTGRES}:{os.environ['PATH']}",
                "DOVECOTE_APP": "workers.app:app",
                "DATABASE_URL": fresh_database_url,
                "NEW_DATABASE_URL": url,
            },
            cwd=tmp_path,
            check=True,
            timeout=60,
        )

    with psycopg.connect(fresh_database_url, autocommit=True) as connection:
        connection.execute(f"create database {migrated} template {make_url(fresh_database_url).database}")
        for _ in range(3):
            connection.execute("select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
        connection.execute("update dovecote.relay_state set checkpoint = 3")
        written = connection.execute(outbox).fetchall()
    shell(dump + restore, empty_database_url)
    shell(data_only, servers.database(migrated))

    for url in (empty_database_url, servers.database(migrated)):
        with psycopg.connect(url, autocommit=True) as connection:
            assert connection.execute(outbox).fetchall() == written
            assert connection.execute("select dovecote.sequence_fault()").fetchone() == (None,)
    with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
        connection.execute(f"drop database {migrated}")
