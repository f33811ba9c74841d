"""The README is true: its examples run against a real database, its names exist, its promises are the design's."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import TupleRow
from sqlalchemy import make_url
from typer.testing import CliRunner

from dovecote.cli import app
from dovecote.local.binaries import find_postgres
from dovecote.local.supervisor import parse_procfile
from tests.conftest import Servers
from tests.support import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = ROOT.parent / "shared" / "DESIGN.md"

TABLES = """
create table orders (id text primary key, total_cents bigint not null);
create table orders_by_day (day date primary key, orders integer not null);
"""


def section(title: str) -> str:
    _, found, rest = README.partition(f"\n## {title}\n")
    assert found, f"README has no section {title!r}"
    return rest.partition("\n## ")[0]


def blocks(title: str, language: str) -> list[str]:
    """The fenced code of a section, in order."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", section(title), re.MULTILINE | re.DOTALL)
    assert found, f"no {language} in {title!r}"
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


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


# Examples ----------------------------------------------------------------------------------------


def test_each_way_to_write_from_python_commits_an_order_and_its_fact(
    shop: psycopg.Connection[TupleRow], fresh_database_url: str, tmp_path: Path
) -> None:
    ways = blocks("Write facts from Python", "python")
    assert len(ways) == 4

    run_as_a_program(tmp_path, "\n\n".join(ways), DATABASE_URL=fresh_database_url)

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
    (statements,) = blocks("Write facts from any other language", "sql")

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

CAREFUL = (
    "+ (Route(handler='shop.keep_orders', events=(OrderPlaced,), function=on_order_placed_once, queue='billing'),)"
)

HELPERS = """
def registered():
    with sessions() as session:
        return list(session.execute(text("select handler_name from dovecote.subscriptions")).scalars())

def place_order_in_a_session(order_id):
    with sessions() as session, session.begin():
        place_order(session, order_id, 1)
"""


def test_the_handler_of_the_example_acts_on_the_fact_of_the_example(
    shop: psycopg.Connection[TupleRow], fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    function, route, careful = blocks("Add a handler", "python")
    writing = "\n\n".join(blocks("Write facts from Python", "python")[:2])
    program = "\n\n".join([writing, function, careful, HELPERS, RUN_THE_HANDLER.format(route=route + CAREFUL)])

    told = run_as_a_program(tmp_path, program, DATABASE_URL=fresh_database_url, REDIS_URL=servers.redis_url)

    # Those of the first two examples were written before, but no relay had published them yet.
    assert "3" in told.splitlines()
    assert shop.execute("select sum(orders) from orders_by_day").fetchall() == [(3,)]
    # Each order was there already, which the other handler catches in a savepoint.
    kept = "select count(*) from dovecote.processed_events where handler_name = 'shop.keep_orders'"
    assert shop.execute(kept).fetchall() == [(3,)]
    assert shop.execute("select * from dovecote.deliveries").fetchall() == []


def test_the_queue_of_the_example_is_one_that_the_procfile_serves() -> None:
    _, route, _ = blocks("Add a handler", "python")
    (queue,) = re.findall(r'queue="(\w+)"', route)

    commands = parse_procfile((ROOT / "Procfile").read_text(encoding="utf-8"))
    assert any(
        queue in command[command.index("--queues") + 1 :] for command in commands.values() if "--queues" in command
    )


@pytest.mark.servers
def test_a_login_with_the_writers_role_appends_and_does_nothing_else(
    shop: psycopg.Connection[TupleRow],
) -> None:
    (grant,) = blocks("Running it for real", "sql")
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


# Pages for operators ------------------------------------------------------------------------------

OPERATIONS = sorted((ROOT / "docs" / "operations").glob("*.md"))
BACKUP = ROOT / "docs" / "operations" / "backup-and-failover.md"
POSTGRES = find_postgres(os.environ).path.parent


@pytest.mark.skipif(not (POSTGRES / "pg_dump").exists(), reason="these programs of Postgres cannot dump")
@pytest.mark.servers
def test_each_way_to_restore_that_the_page_shows_gives_a_system_that_goes_on(
    fresh_database_url: str, empty_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    dump, restore, data_only, _ = re.findall(r"```sh\n(.*?)```", BACKUP.read_text(encoding="utf-8"), re.DOTALL)
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


@pytest.mark.parametrize("path", OPERATIONS, ids=lambda path: path.stem)
def test_every_command_and_setting_that_a_page_names_exists(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    commands = set(re.findall(r"`dovecote ([a-z]+)", page))
    settings = set(re.findall(r"DOVECOTE_\w+__\w+", page))

    assert commands | settings
    assert [name for name in settings if f"`{name}`" not in README] == []
    assert [word for word in commands if CliRunner().invoke(app, [word, "--help"]).exit_code != 0] == []


SECURITY = ROOT / "docs" / "security-model.md"


def test_every_attack_on_the_security_page_has_the_test_that_it_names() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?` \|$", SECURITY.read_text(encoding="utf-8"), re.MULTILINE)

    assert len(named) > 30
    for file, test in named:
        text = (ROOT / "tests" / "security" / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {test or 'test_'}", text, re.MULTILINE), (file, test)


# Names and words ---------------------------------------------------------------------------------


def test_every_file_the_readme_names_is_there() -> None:
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    quoted = re.findall(r"`((?:domain|workers|docs|migrations|tests)/[\w/.]+)`", README)

    assert linked
    assert quoted
    assert [name for name in (*linked, *quoted) if not (ROOT / name).exists()] == []


def test_every_command_the_readme_names_exists() -> None:
    named = set(re.findall(r"(?:`|^ +\$? ?|bin/)(?:\./dev|dovecote) ([a-z]+)", README, re.MULTILINE))

    assert {"up", "test", "status", "exec", "ingest", "demo", "settings", "migrate"} <= named
    not_yet = set(re.findall(r"dovecote (\w+)", section("What is promised")))
    theirs = {"test", "chaos", "setup", "help"}
    for word in named - theirs - not_yet:
        done = commands.run([word, "--help"], os.environ, ROOT)
        assert done.returncode == 0, word
    shown = subprocess.run([str(ROOT / "dev"), "help"], capture_output=True, text=True, timeout=30, check=True).stdout
    for word in theirs:
        assert f"./dev {word}" in shown


def promises(text: str) -> dict[str, str]:
    """Number and words of each row `| P1 | words | ... |`."""
    return {number: words.strip() for number, words in re.findall(r"^\| (P\d+) \| ([^|]+)\|", text, re.MULTILINE)}


def test_the_readme_makes_twelve_promises() -> None:
    assert list(promises(README)) == [f"P{number}" for number in range(1, 13)]


@pytest.mark.skipif(not DESIGN.exists(), reason="the design is not beside this checkout")
def test_the_promises_are_the_design_s_word_for_word() -> None:
    assert promises(README) == promises(DESIGN.read_text(encoding="utf-8"))


# Decisions ---------------------------------------------------------------------------------------

DECISIONS = sorted((ROOT / "docs" / "adr").glob("*.md"))


def test_decisions_are_numbered_without_a_gap() -> None:
    assert [path.name[:4] for path in DECISIONS] == [f"{number:04}" for number in range(1, len(DECISIONS) + 1)]
    assert len(DECISIONS) >= 10


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_is_one_page_with_its_four_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert re.match(rf"# {path.name[:4]}\. [A-Z]", text)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == [
        "Context",
        "Decision",
        "Alternatives",
        "Consequences",
    ]
    assert len(text.splitlines()) <= 80


@pytest.mark.parametrize("folder", ["dovecote", "domain", "workers", "migrations", "tests"])
def test_every_decision_that_the_code_names_is_there(folder: str) -> None:
    named = {
        name
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".sql", ".lua")
        for name in re.findall(r"docs/adr/[\w-]+\.md", file.read_text(encoding="utf-8"))
    }

    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_change_log_has_a_place_for_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

    assert "## Unreleased" in text
