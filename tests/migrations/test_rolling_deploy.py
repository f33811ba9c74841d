"""Code that is newer than its schema waits for it, and a migration only adds, so that older code goes on working."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from alembic.script import ScriptDirectory

from dovecote.migrations import schema
from dovecote.migrations.revisions import revisions
from tests.conftest import Servers
from tests.support.keys import KEYS
from tests.support.migrations import LOCATIONS
from tests.support.processes import eventually

ROOT = Path(__file__).parents[2]

#: The head of 0.1.0: it and all below it are in their final form. No code is older than that.
FIRST_RELEASE = "application_0003"

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
    script = ScriptDirectory.from_config(schema._config(LOCATIONS))
    first = {one.revision for one in script.iterate_revisions(FIRST_RELEASE, (), implicit_base=True)}
    assert {FIRST_RELEASE, "dovecote_0001"} <= first
    for revision in (one for one in script.walk_revisions() if one.revision not in first):
        path = Path(revision.path)
        source = path.read_text()
        files = [path.parents[1] / "sql" / f"{path.stem}.up.sql"]
        sql = "".join(file.read_text() for file in files if file.exists())
        upgrade = source[source.index("def upgrade") : source.index("def downgrade")]
        found = contractions(sql) + contractions(upgrade)
        if not getattr(revision.module, "CONTRACT", None):
            assert found == [], f"{revision.revision}: old code may still use that; see docs/guides/versions.md"


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


# Code that is newer than its schema -----------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """A process of this code, and what it printed."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def says(self, words: str) -> bool:
        return words in self.log.read_text(errors="replace")


@contextmanager
def running(variables: dict[str, str], log: Path, *command: str) -> Iterator[Started]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *command], cwd=ROOT, env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
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


RELAY = ("dovecote", "relay")
CONSUMERS = ("dramatiq", "dovecote.bootstrap:consumers", "--queues", "billing", "--processes", "1", "--threads", "2",
             "--skip-logging")  # fmt: skip


def count(url: str, query: str) -> int:
    with psycopg.connect(url) as connection:
        (number,) = connection.execute(query.encode()).fetchone() or (0,)
    return int(number)


def test_relay_and_consumers_wait_for_a_schema_that_is_older_and_writers_do_not(
    empty_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    schema.upgrade(empty_database_url, revisions(locations=LOCATIONS)[-2], locations=LOCATIONS)
    variables = {
        "DATABASE_URL": empty_database_url,
        "REDIS_URL": servers.redis_url,
        "DOVECOTE_APP": "workers.app:app",
        "DOVECOTE_HOME": str(tmp_path),
        "DOVECOTE_REDIS__NAMESPACE": f"test-{uuid4().hex[:8]}",
        **KEYS,
        "DOVECOTE_CONSUMERS__POLL_INTERVAL_MS": "100",
    }
    with (
        running(variables, tmp_path / "relay.log", *RELAY) as relay,
        running(variables, tmp_path / "consumers.log", *CONSUMERS) as consumers,
    ):
        subprocess.run(
            [sys.executable, "-P", "-c", WRITE, str(MEMBERSHIPS)], cwd=ROOT, check=True, timeout=60,
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        # Consumers look at the schema when a message comes: there is none while the relay waits.
        eventually(partial(relay.says, "run `dovecote migrate`"), 60, "waiting for the schema, in words")
        assert (relay.process.poll(), consumers.process.poll()) == (None, None)
        assert count(empty_database_url, "select count(*) from dovecote.published_batches") == 0

        schema.upgrade(empty_database_url, locations=LOCATIONS)

        done = "select count(*) from dovecote.billing_history"
        eventually(lambda: count(empty_database_url, done) == 3 * MEMBERSHIPS, 60, "all of it, once it is migrated")
        assert count(empty_database_url, "select count(*) from dovecote.deliveries") == 0
