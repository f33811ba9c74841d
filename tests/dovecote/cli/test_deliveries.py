"""The commands about failures, as people and scripts meet them."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from dovecote import operations
from dovecote.operations.deliveries import DeliverySelection
from dovecote.store.connections import connect
from tests.dovecote.cli.test_cli import assert_one_sentence, dovecote, environment

HANDLER = "pricing.apply_quotes"


@pytest.fixture
def own_engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
                " event_type, state, attempts, error_type, error_fingerprint, error, headline)"
                " select :handler, dovecote.uuid_v7(), n, 'price', 's' || n, 'pricing.price_quoted.v1', 'dead', 8,"
                " 'Refused', 'aaa' || n % 2, 'no [/markup]', 'no [/markup]' from generate_series(1, 10) n"
            ),
            {"handler": HANDLER},
        )
    yield engine
    engine.dispose()


@pytest.fixture
def run(tmp_path: Path, fresh_database_url: str, own_engine: Engine) -> Any:
    return lambda *words: dovecote(tmp_path, *words, DATABASE_URL=fresh_database_url)


def test_failures_are_listed_by_kind_rehearsed_retried_and_audited(run: Any) -> None:
    groups = json.loads(run("deliveries", "list", "--json").stdout)["groups"]
    rehearsal = run("deliveries", "retry", "--fingerprint", "aaa1", "--dry-run").stdout
    change = json.loads(run("deliveries", "retry", "--fingerprint", "aaa1", "--actor", "ada", "--json").stdout)
    rows = json.loads(run("deliveries", "list", "--state", "dead", "--rows", "--json").stdout)["deliveries"]
    (entry,) = json.loads(run("audit", "--actor", "ada", "--json").stdout)["entries"]

    assert [(group["fingerprint"], group["count"]) for group in groups] == [("aaa0", 5), ("aaa1", 5)]
    assert rehearsal.startswith("5 would be sent again; nothing was changed\n")
    assert change["affected"] == 5
    assert {row["fingerprint"] for row in rows} == {"aaa0"}
    assert (entry["action"], entry["affected"], entry["details"]["filter"]) == (
        "deliveries.retry",
        5,
        {"fingerprint": "aaa1"},
    )


def _first(run: Any, before: str) -> str:
    """Return the event of the first line behind a page."""
    found: str = json.loads(run("deliveries", "list", "--before", before, "--json").stdout)["deliveries"][0]["event_id"]
    return found


def test_people_read_the_same_in_tables(run: Any) -> None:
    assert "no [/markup]" in run("deliveries", "list").stdout
    event_id = run("deliveries", "list", "--rows", "--limit", "1").stdout.splitlines()[1].split()[0]
    assert f"{event_id}, pricing.price_quoted.v1, position 10" in run("deliveries", "show", HANDLER, event_id).stdout
    *_, more = run("deliveries", "list", "--rows", "--limit", "1").stdout.split("more: --before ")
    assert "position 9" in run("deliveries", "show", HANDLER, _first(run, more.strip())).stdout
    done = run("deliveries", "discard", HANDLER, event_id, "--reason", "test data")
    assert (done.returncode, done.stdout) == (0, "1 discarded\n")
    assert "deliveries.discard" in run("audit").stdout
    assert run("aggregates", "blocked").stdout == "no aggregate is blocked\n"


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        (["deliveries", "retry"], 2, "--all-matching"),
        (["deliveries", "retry", HANDLER], 2, "which event"),
        (["deliveries", "retry", HANDLER, "x", "--all-matching"], 2, "not both"),
        (["deliveries", "retry", HANDLER, "00000000-0000-7000-8000-000000000000"], 1, "no failed delivery of"),
        (["deliveries", "retry", "--all-matching", "--state", "waiting"], 1, "no retry of waiting"),
        (["deliveries", "discard", "--all-matching", "--reason", " "], 2, "needs a reason"),
        (["deliveries", "list", "--rows", "--before", "x"], 2, "is no cursor of this listing"),
        (["deliveries", "list", "--rows", "--before", "\u00b2"], 2, "is no cursor of this listing"),
        (["deliveries", "list", "--handler", "pricing.apply_quote"], 2, "there is no handler 'pricing.apply_quote'"),
        (["deliveries", "retry", "--all-matching", "--handler", "nobody"], 2, "there is no handler 'nobody'"),
        (["deliveries", "retry", "--all-matching", "--actor", ""], 2, "who does this?"),
        (["aggregates", "blocked", "--after", "x"], 2, "is no cursor of this listing"),
        (["aggregates", "blocked", "--handler", "nobody"], 2, "there is no handler 'nobody'"),
        (["aggregates", "blocked", "--handler", HANDLER], 2, "keeps no order"),
        (["events", "list", "--aggregate-id", "EUR"], 2, "needs its type too"),
        (["events", "list", "--until", "0026-11-20"], 2, "a year has four digits"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(run: Any, command: list[str], code: int, says: str) -> None:
    assert_one_sentence(run(*command), code, says)


def test_what_waits_is_a_kind_of_its_own_and_no_more_kinds_are_shown_than_asked_for(
    run: Any, own_engine: Engine
) -> None:
    with own_engine.begin() as connection:
        connection.execute(
            text(
                "update dovecote.deliveries set state = 'waiting', error_fingerprint = null, error = null,"
                " headline = null where position <= 3"
            )
        )

    (waiting,) = json.loads(run("deliveries", "list", "--state", "waiting", "--json").stdout)["groups"]
    dead = run("deliveries", "list", "--limit", "1").stdout

    assert (waiting["fingerprint"], waiting["count"], waiting["error"]) == (None, 3, None)
    assert len(dead.splitlines()) == 3
    assert "more kinds than these 1" in dead


def test_a_narrow_terminal_cuts_no_id(own_engine: Engine, fresh_database_url: str, tmp_path: Path) -> None:
    event_id = operations.deliveries.list_deliveries(own_engine, DeliverySelection(), limit=1).items[0].event_id
    variables = {"DATABASE_URL": fresh_database_url, "COLUMNS": "40", "TERM": "xterm"}
    ours, theirs = pty.openpty()

    with subprocess.Popen(
        [sys.executable, "-m", "dovecote", "deliveries", "list", "--rows"],
        env=environment(tmp_path, variables),
        stdout=theirs,
    ) as listing:
        os.close(theirs)
        shown = b""
        with suppress(OSError):
            while read := os.read(ours, 10_000):
                shown += read
        os.close(ours)

    assert listing.returncode == 0
    assert str(event_id) in shown.decode()
