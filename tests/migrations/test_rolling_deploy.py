"""Old code on the new schema, new code on the old one, both side by side: in processes of their own, on real servers.

The old code is the commit that ended the first release's work; it comes out of the repository's history.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from alembic.script import ScriptDirectory

from dovecote.migrations import schema
from tests.conftest import Servers
from tests.support.keys import KEYS
from tests.support.processes import eventually

ROOT = Path(__file__).parents[2]
OLD_COMMIT = "6d2ad91"
OLD_SCHEMA = "0005"

MEMBERSHIPS = 20

WRITE = """
import os, sys
from datetime import UTC, datetime, timedelta
from domain import billing
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work

sessions = sessions_for(connect(os.environ["DATABASE_URL"]))
now = datetime.now(UTC)
for n in range(int(sys.argv[1])):
    with unit_of_work(sessions) as uow:
        one = billing.start_membership(uow, f"user-{n}", billing.Tier.MONTHLY, now)
        billing.activate_membership(uow, one.id, now, until=now + timedelta(days=30))
        billing.cancel_membership(uow, one.id, now)
"""


# The same in the old code, where all of it lay in one package.
OLD_WRITE = WRITE.replace("dovecote.store.connections", "domain.database").replace("dovecote.unit", "domain.unit")


# What a migration may do --------------------------------------------------------------------------

_BODY = re.compile(r"\$(\w*)\$.*?\$\1\$|^begin atomic$.*?^end;", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"--[^\n]*")
_CONTRACTS = re.compile(
    r"\bdrop\s+(table|column|function|procedure|view|index|constraint|type|sequence|trigger|schema|role)\b"
    r"|\balter\s+column\s+\w+\s+(set\s+data\s+)?type\b|\bset\s+not\s+null\b|\brename\b|\brevoke\b.*\bfrom\s+dovecote_"
    r"|\btruncate\b|\bdelete\s+from\b",
    re.IGNORECASE,
)


def contractions(sql: str) -> list[str]:
    """What of these statements old code may stumble over; function bodies run later and are left out."""
    plain = _COMMENT.sub("", _BODY.sub("''", sql))
    return [" ".join(found.group().split()).lower() for found in _CONTRACTS.finditer(plain)]


def test_every_migration_above_the_first_release_only_adds() -> None:
    revisions = [one for one in ScriptDirectory(str(schema.MIGRATIONS)).walk_revisions() if one.revision > OLD_SCHEMA]
    assert revisions
    for revision in revisions:
        source = Path(revision.path).read_text()
        files = re.findall(r'"(\w+\.up\.sql)"', source)
        sql = "".join((schema.MIGRATIONS / "sql" / name).read_text() for name in files)
        upgrade = source[source.index("def upgrade") : source.index("def downgrade")]
        found = contractions(sql) + contractions(upgrade)
        if not getattr(revision.module, "CONTRACT", None):
            assert found == [], f"{revision.revision}: old code may still use that; see the README on migrations"


@pytest.mark.parametrize(
    "statement",
    [
        "alter table dovecote.outbox drop column headers;",
        "drop table dovecote.replays;",
        "alter table dovecote.replays rename to replayed;",
        "alter table dovecote.replays alter column total type integer;",
        "alter table dovecote.replays alter total set not null;",
        "revoke insert on dovecote.outbox from dovecote_writer;",
    ],
)
def test_what_takes_away_is_seen(statement: str) -> None:
    assert contractions(statement)
    assert not contractions(f"create function f() returns void language plpgsql as $$ begin {statement} end $$;")


# Old and new, side by side ------------------------------------------------------------------------

Start = Callable[..., "Started"]


@dataclass(frozen=True)
class Started:
    """A process of some code, and what it printed."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def says(self, words: str) -> bool:
        return words in self.log.read_text(errors="replace")

    def terminate(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first release's code, unpacked."""
    place = tmp_path_factory.mktemp("old")
    git, tar = shutil.which("git"), shutil.which("tar")
    if git is None or tar is None:
        pytest.skip("git and tar bring the old code; one of them is not here")
    packed = subprocess.run(
        [git, "archive", OLD_COMMIT, "domain", "workers", "migrations"], cwd=ROOT, capture_output=True
    )
    if packed.returncode != 0:
        # A shallow clone, an sdist, or a machine without git.
        pytest.skip(f"commit {OLD_COMMIT} is not in the history here")
    subprocess.run([tar, "-x", "-C", str(place)], input=packed.stdout, check=True)
    return place


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run a command with some code, until the test ends."""
    with ExitStack() as stack:

        def start(code: Path, variables: Mapping[str, str], *command: str) -> Started:
            return stack.enter_context(_running(code, variables, command, tmp_path / f"{uuid4().hex}.log"))

        yield start


@contextmanager
def _running(code: Path, variables: Mapping[str, str], command: tuple[str, ...], log: Path) -> Iterator[Started]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command], cwd=code, env=variables_for(code, variables),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield Started(process, log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment(database_url: str, redis_url: str, home: Path) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "DOVECOTE_HOME": str(home),
        "DOVECOTE_REDIS__NAMESPACE": f"test-{uuid4().hex[:8]}",
        **KEYS,
    }


# Modules of the old code, and those of today.
OLD_RELAY, RELAY = ("workers", "relay"), ("dovecote", "relay")
_OPTIONS = ("--queues", "billing", "--processes", "1", "--threads", "2", "--skip-logging")
OLD_CONSUMERS = ("dramatiq", "workers.bootstrap:consumers", *_OPTIONS)
CONSUMERS = ("dramatiq", "dovecote.bootstrap:consumers", *_OPTIONS)


def variables_for(code: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process with that code; the old one knows neither applications nor today's settings."""
    more = {**os.environ, **variables, "PYTHONPATH": str(code)}
    if code == ROOT:
        return {**more, "DOVECOTE_APP": "workers.app:app", "DOVECOTE_CONSUMERS__POLL_INTERVAL_MS": "100"}
    more.pop("DOVECOTE_APP", None)
    return {**more, "DOVECOTE_CONSUMERS__IDLE_WAIT_MS": "100"}


def write(code: Path, variables: Mapping[str, str], memberships: int = MEMBERSHIPS) -> None:
    subprocess.run(
        [sys.executable, "-P", "-c", WRITE if code == ROOT else OLD_WRITE, str(memberships)],
        cwd=code, env=variables_for(code, variables), check=True, timeout=60,
    )  # fmt: skip


class Counted:
    """What a database says, asked for one number at a time."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, query: str) -> int:
        with psycopg.connect(self._url) as connection:
            (number,) = connection.execute(query.encode()).fetchone() or (0,)
        return int(number)

    def done(self) -> int:
        return self("select count(*) from dovecote.billing_history")

    def behind(self) -> int:
        return self("select count(*) from dovecote.outbox, dovecote.relay_state where position > checkpoint")


def test_old_code_works_on_the_new_schema_and_hands_over_to_new_code(
    old_code: Path, start: Start, fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    variables = environment(fresh_database_url, servers.redis_url, tmp_path)
    count = Counted(fresh_database_url)
    old_relay = start(old_code, variables, *OLD_RELAY)
    old_consumers = start(old_code, variables, *OLD_CONSUMERS)
    write(old_code, variables)
    eventually(lambda: count.done() == 3 * MEMBERSHIPS, 60, "old code done on the new schema")

    # The worst order: writers first. They write a version that nobody here knows yet.
    write(ROOT, variables)
    eventually(lambda: count.done() >= 5 * MEMBERSHIPS and count.behind() == 0, 60, "what the old relay knows")
    assert count.done() == 5 * MEMBERSHIPS
    start(ROOT, variables, *CONSUMERS)
    old_consumers.terminate()
    start(ROOT, variables, *RELAY)
    old_relay.terminate()

    eventually(lambda: count.done() == 6 * MEMBERSHIPS, 60, "what was passed over, by the new relay")
    write(old_code, variables)
    eventually(lambda: count.done() == 9 * MEMBERSHIPS, 60, "an old writer's version, by new code")
    assert count("select count(*) from dovecote.deliveries") == 0
    assert count("select count(*) from dovecote.processed_events") == 9 * MEMBERSHIPS


def test_new_code_on_the_old_schema_writes_at_once_and_works_once_it_is_migrated(
    old_code: Path, start: Start, empty_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    schema.upgrade(empty_database_url, OLD_SCHEMA)
    variables = environment(empty_database_url, servers.redis_url, tmp_path)
    count = Counted(empty_database_url)
    old_relay = start(old_code, variables, *OLD_RELAY)
    new_relay, new_consumers = start(ROOT, variables, *RELAY), start(ROOT, variables, *CONSUMERS)

    write(ROOT, variables)

    eventually(lambda: count.behind() == 0, 60, "the old relay publishes what the new writer wrote")
    for one in (new_relay, new_consumers):
        eventually(partial(one.says, "run `dovecote migrate`"), 60, "waiting for the schema, in words")
        assert one.process.poll() is None
    assert count.done() == 0

    schema.upgrade(empty_database_url)
    eventually(partial(new_consumers.says, "it is not signed"), 60, "the new consumers, on what the old relay sent")
    assert count.done() == 0
    old_relay.terminate()
    eventually(lambda: count.done() == 3 * MEMBERSHIPS, 60, "all of it, once the new relay leads")
    assert count("select count(*) from dovecote.deliveries") == 0
