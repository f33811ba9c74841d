"""The command as people and scripts meet it: what it prints, how it ends, and that it never shows a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from sqlalchemy import make_url
from typer.testing import CliRunner

from domain import billing
from dovecote.cli import app
from dovecote.migrations.revisions import revisions
from dovecote.settings import Settings
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
from tests.conftest import Servers
from tests.support import commands
from tests.support.keys import KEYS
from tests.support.migrations import LOCATIONS
from tests.support.processes import a_place_for_servers, are_there
from tests.support.system import system_for
from workers.routes import ROUTES

ROOT = Path(__file__).parents[3]

NOBODY = "postgresql://me:hunter2secret@127.0.0.1:1/mine"

HANDLER_KEYS = {
    "processed",
    "unprocessed",
    "retrying",
    "waiting",
    "dead",
    "discarded",
    "oldest_unprocessed_seconds",
    "processed_per_second",
    "paused",
    "at_least",
}
RELAY_KEYS = {
    "fault",
    "lag_events",
    "lag_seconds",
    "leading",
    "owner",
    "epoch",
    "history",
    "instance",
    "stands_back_for",
    "checkpoint",
    "published",
    "published_per_second",
    "at_least",
    "foreign_locks",
}


def dovecote(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return commands.run_text([*arguments], environment(home, variables), home)


def environment(home: Path, variables: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("PATH", "DOVECOTE_POSTGRES_BIN", "DOVECOTE_REDIS_BIN") if name in os.environ
    }
    return {**kept, "DOVECOTE_APP": "workers.app:app", "PYTHONPATH": str(ROOT), "DOVECOTE_HOME": str(home), **variables}


def write_a_membership(url: str) -> None:
    engine = connect(url)
    with unit_of_work(sessions_for(engine)) as uow:
        billing.start_membership(uow, "user-1", billing.Tier.FREE, datetime.now(UTC))
    engine.dispose()


# Looking -----------------------------------------------------------------------------------------


def test_status_of_a_system_that_nobody_leads_shows_what_waits(tmp_path: Path, fresh_database_url: str) -> None:
    write_a_membership(fresh_database_url)

    done = dovecote(tmp_path, "status", "--json", DATABASE_URL=fresh_database_url)

    assert (done.returncode, done.stderr) == (0, "")
    status = json.loads(done.stdout)
    assert set(status) == {"relay", "handlers", "unrouted"}
    relay = status["relay"]
    assert set(relay) == RELAY_KEYS
    assert (relay["lag_events"], relay["leading"], relay["owner"], relay["published"]) == (1, False, None, 0)
    assert relay["lag_seconds"] > 0
    assert relay["foreign_locks"] == []
    assert set(status["handlers"]) == {route.handler for route in ROUTES}
    assert all(set(handler) == HANDLER_KEYS for handler in status["handlers"].values())
    billing_handler = status["handlers"]["billing.write_history"]
    assert (billing_handler["processed"], billing_handler["unprocessed"]) == (0, 1)
    assert billing_handler["oldest_unprocessed_seconds"] > 0


def test_status_of_a_running_system_shows_its_leader_and_what_is_done(tmp_path: Path, settings: Settings) -> None:
    url = settings.database.url.get_secret_value()

    with system_for(settings, ROUTES) as system, system.running():
        write_a_membership(url)
        system.until_quiet()
        machine = json.loads(dovecote(tmp_path, "status", "--json", DATABASE_URL=url).stdout)
        people = dovecote(tmp_path, "status", DATABASE_URL=url).stdout

    relay, handler = machine["relay"], machine["handlers"]["billing.write_history"]
    assert (relay["lag_events"], relay["lag_seconds"], relay["leading"], relay["published"]) == (0, 0, True, 1)
    assert relay["owner"]
    assert {key: handler[key] for key in HANDLER_KEYS - {"oldest_unprocessed_seconds", "processed_per_second"}} == {
        "paused": None,
        "at_least": [],
        "processed": 1,
        "unprocessed": 0,
        "retrying": 0,
        "waiting": 0,
        "dead": 0,
        "discarded": 0,
    }
    assert 0 < handler["processed_per_second"] <= 1
    assert re.search(r"^relay +led by \S+; 0 events behind, 0\.0 s; 1 published, 0\.\d+/s$", people, re.MULTILINE)
    assert re.search(r"^billing\.write_history +1 +0\.\d+ +0 +0 +0 +0 *$", people, re.MULTILINE)


def test_a_watched_status_is_one_line_each_time_and_ends_well_on_ctrl_c(
    tmp_path: Path, fresh_database_url: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "dovecote", "status", "--watch", "--every-seconds", "0.2", "--json"],
        env=environment(tmp_path, {"DATABASE_URL": fresh_database_url}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout
        assert watching.stderr
        looks = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        code, complaints = watching.wait(30), watching.stderr.read()

    assert [set(look) for look in looks] == [{"relay", "handlers", "unrouted"}] * 2
    assert (code, complaints) == (0, "")


def test_the_version_is_the_distribution_s(tmp_path: Path) -> None:
    assert re.fullmatch(r"dovecote \d+\.\d+\.\d+\n", dovecote(tmp_path, "--version").stdout)


def every_command(group: Any, *words: str) -> Iterator[list[str]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, *words, name)
        else:
            yield [*words, name]


@pytest.mark.parametrize("command", list(every_command(typer.main.get_command(app))), ids=" ".join)
def test_every_command_s_help_has_an_example(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"])

    assert done.exit_code == 0
    assert re.search(rf"Example: .*dovecote {' '.join(command)}\b", " ".join(done.output.split()))


def test_exec_gives_a_command_what_it_needs_to_find_the_system(tmp_path: Path) -> None:
    url = "postgresql://me:hunter2secret@db.example:6543/mine"
    program = "import os, json; print(json.dumps(dict(os.environ)))"

    done = dovecote(
        tmp_path, "exec", sys.executable, "-c", program, DATABASE_URL=url, REDIS_URL="redis://cache.example:1/2"
    )

    given = json.loads(done.stdout)
    assert (given["DATABASE_URL"], given["REDIS_URL"]) == (url, "redis://cache.example:1/2")
    names = ("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE")
    assert [given[name] for name in names] == ["db.example", "6543", "me", "hunter2secret", "mine"]


def test_exec_ends_as_its_command_ends(tmp_path: Path) -> None:
    variables = {"DATABASE_URL": NOBODY, "REDIS_URL": "redis://127.0.0.1:1/0"}

    assert dovecote(tmp_path, "exec", sys.executable, "-c", "raise SystemExit(7)", **variables).returncode == 7


# Ending badly ------------------------------------------------------------------------------------


def assert_one_sentence(done: subprocess.CompletedProcess[str], code: int, *says: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "hunter2secret" not in done.stderr
    for part in says:
        assert part in done.stderr
    assert done.stderr.startswith("dovecote: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["relay"],
        ["migrate"],
        ["exec", "true"],
        ["ingest", "prices", "-"],
        ["settings", "--in-force"],
    ],
    ids=" ".join,
)
def test_without_a_system_a_command_says_what_is_missing(tmp_path: Path, command: list[str]) -> None:
    done = dovecote(tmp_path, *command)

    assert_one_sentence(done, 2, "DATABASE_URL is missing", "`dovecote up`")


@pytest.mark.parametrize("command", [["status"], ["migrate"], ["demo"], ["ingest", "prices", "a.csv"]], ids=" ".join)
def test_a_postgres_that_is_away_is_one_sentence_and_exit_code_1(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "a.csv").write_text("symbol,price,at\nEUR,1,2024-05-01\n")

    done = dovecote(tmp_path, *command, DATABASE_URL=NOBODY, REDIS_URL="redis://127.0.0.1:1/0")

    done.stderr = done.stderr.removeprefix(
        "dovecote: 0 rows are in, up to line 0; of the rest none is, or the next transaction of at most 500 rows\n"
    )
    assert_one_sentence(done, 1, "Postgres is not there: ", "Connection refused")


@pytest.mark.servers
@pytest.mark.parametrize("command", [["status"], ["relay"]], ids=" ".join)
def test_a_database_that_was_never_migrated_is_named_as_such(
    tmp_path: Path, empty_database_url: str, command: list[str]
) -> None:
    done = dovecote(tmp_path, *command, DATABASE_URL=empty_database_url, REDIS_URL="redis://127.0.0.1:1/0")

    assert_one_sentence(done, 1, "the database has no Dovecote schema", "run `dovecote migrate`")


def test_a_wrong_password_is_one_sentence_without_it(tmp_path: Path, servers: Servers) -> None:
    url = make_url(servers.postgres_url).set(password="hunter2secret").render_as_string(hide_password=False)

    done = dovecote(tmp_path, "status", DATABASE_URL=url)

    assert_one_sentence(done, 1, "password authentication failed")


def test_a_revision_that_does_not_exist_is_one_sentence(tmp_path: Path, fresh_database_url: str) -> None:
    done = dovecote(tmp_path, "migrate", "--to", "9999", DATABASE_URL=fresh_database_url)

    assert_one_sentence(done, 1, "the schema cannot be migrated", "9999")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["exec", "a-command-nobody-has"], "there is no command 'a-command-nobody-has'"),
        (["ingest", "prices", "nowhere.csv"], "nowhere.csv: it cannot be read"),
    ],
)
def test_what_is_not_there_is_exit_code_2(tmp_path: Path, command: list[str], says: str) -> None:
    done = dovecote(tmp_path, *command, DATABASE_URL=NOBODY, REDIS_URL="redis://127.0.0.1:1/0")

    assert_one_sentence(done, 2, says)


@pytest.mark.parametrize(
    "command", [["fly"], ["status", "--yaml"], ["demo", "--events", "0"], ["ingest", "prices"], []]
)
def test_a_command_line_that_makes_no_sense_is_exit_code_2(tmp_path: Path, command: list[str]) -> None:
    done = dovecote(tmp_path, *command)

    assert done.returncode == 2
    assert "Usage:" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_that_are_no_text_are_refused_in_words(tmp_path: Path) -> None:
    done = dovecote(tmp_path, "events", "list", "--type", os.fsdecode(b"\xff"), DATABASE_URL=NOBODY)

    assert_one_sentence(done, 2, "'?' is not UTF-8")


def test_an_age_too_long_for_the_calendar_is_no_time(tmp_path: Path) -> None:
    done = dovecote(tmp_path, "events", "list", "--since", "999999999999w", DATABASE_URL=NOBODY)

    assert (done.returncode, "is no time" in done.stderr) == (2, True)


def test_a_reader_that_stops_reading_is_no_error_of_ours(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dovecote", "settings", "--markdown"],
            env=environment(tmp_path, {}),
            stdout=writes,
            stderr=subprocess.PIPE,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        os.close(writes)

    assert "Traceback" not in done.stderr


# The demonstration -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home below /var/tmp with nothing running in it."""
    with a_place_for_servers() as place:
        yield place


def processes_that_name(home: Path) -> list[int]:
    def names_it(pid: int) -> bool:
        try:
            # Processes get it as DOVECOTE_HOME, servers in their command line.
            return any(os.fsencode(home) in Path(f"/proc/{pid}/{part}").read_bytes() for part in ("environ", "cmdline"))
        except OSError:
            return False

    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and names_it(int(entry.name))]


def test_a_demonstration_brings_its_own_system_and_leaves_no_process_behind(home: Path) -> None:
    done = dovecote(home, "demo", "--events", "200", "--json")

    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert set(report) == {"written", "published", "processed", "lost", "duplicated", "seconds"}
    assert [report[key] for key in ("written", "published", "processed", "lost", "duplicated")] == [200, 200, 200, 0, 0]
    assert 0 < report["seconds"] < 60
    assert "Traceback" not in done.stderr
    assert not are_there(processes_that_name(home))


def test_a_demonstration_in_words_finds_the_data_of_the_last_one(home: Path) -> None:
    done = dovecote(home, "demo", "--events", "20")

    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"20 written, 20 published, 20 processed, 0 lost, 0 duplicated, in \d+\.\d+ s\n", done.stdout)


def test_a_demonstration_without_consumers_says_what_is_lost_and_fails(settings: Settings, tmp_path: Path) -> None:
    with system_for(settings, ROUTES) as system, system.relay():
        done = dovecote(
            tmp_path,
            *("demo", "--events", "10", "--timeout-seconds", "1", "--json"),
            DATABASE_URL=settings.database.url.get_secret_value(),
            REDIS_URL=settings.redis.url.get_secret_value(),
            **KEYS,
        )

    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert (report["written"], report["processed"], report["lost"], report["duplicated"]) == (10, 0, 10, 0)


@pytest.mark.servers
def test_migrating_can_be_tried_first_and_twice_changes_nothing(tmp_path: Path, empty_database_url: str) -> None:
    rehearsal = dovecote(tmp_path, "migrate", "--dry-run", "--json", DATABASE_URL=empty_database_url)
    first = dovecote(tmp_path, "migrate", DATABASE_URL=empty_database_url)
    again = dovecote(tmp_path, "migrate", DATABASE_URL=empty_database_url)

    assert json.loads(rehearsal.stdout) == {"dry_run": True, "revisions": revisions(locations=LOCATIONS)}
    assert (first.returncode, first.stdout) == (0, "the schema is up to date\n")
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("select count(*) from dovecote.outbox").fetchone() == (0,)
    *_, target, second, last = revisions(locations=LOCATIONS)
    back = dovecote(tmp_path, "migrate", "--down-to", target, "--dry-run", DATABASE_URL=empty_database_url)
    assert back.stdout == f"would be undone: {last}, {second}; nothing was changed\n"
