"""`dovecote replay` as an operator meets it; the relay's part is tested in tests/dovecote/relay/test_replayer.py."""

import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from domain import billing
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
from tests.dovecote.cli.test_cli import assert_one_sentence, dovecote

HANDLER = "billing.write_history"


@pytest.fixture
def database(fresh_database_url: str) -> str:
    """A database with three events of billing, of which one was acted on."""
    engine = connect(fresh_database_url)
    with unit_of_work(sessions_for(engine)) as uow:
        for user in ("ada", "bob", "cyd"):
            billing.start_membership(uow, user, billing.Tier.FREE, datetime.now(UTC))
    engine.dispose()
    with psycopg.connect(fresh_database_url) as connection:
        connection.execute(
            "insert into dovecote.processed_events (event_id, handler_name)"
            " select id, %s from dovecote.outbox order by position limit 1",
            (HANDLER,),
        )
    return fresh_database_url


Run = Callable[..., subprocess.CompletedProcess[str]]
AsJson = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, database: str) -> Run:
    return lambda *words: dovecote(tmp_path, "replay", *words, DATABASE_URL=database)


@pytest.fixture
def as_json(run: Run) -> AsJson:
    def as_json(*words: str) -> dict[str, Any]:
        done = run(*words, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return as_json


def test_a_dry_run_reports_and_changes_nothing(run: Run, as_json: AsJson) -> None:
    plan = as_json("start", "--handler", HANDLER, "--reason", "a test", "--dry-run")

    assert (plan["events"], plan["mode"], plan["replay_id"]) == (2, "backfill", None)
    assert len(plan["sample"]) == 2
    assert as_json("list") == {"replays": [], "before": None}
    words = run("start", "--handler", HANDLER, "--reason", "a test", "--mode", "reprocess", "--dry-run")
    assert "would replay 1 events for billing.write_history (reprocess), positions 1 to 1" in words.stdout


def test_a_replay_is_started_looked_at_paused_resumed_and_cancelled(database: str, run: Run, as_json: AsJson) -> None:
    id = as_json("start", "--handler", HANDLER, "--reason", "INC-7", "--rate", "5", "--actor", "ada")["replay_id"]

    shown = as_json("show", id)
    assert (shown["state"], shown["total"], shown["done"], shown["rate"]) == ("pending", 2, 0, 5)
    assert (shown["actor"], shown["reason"]) == ("ada", "INC-7")
    assert [one["id"] for one in as_json("list", "--handler", HANDLER)["replays"]] == [id]
    assert as_json("pause", id, "--dry-run")["state"] == "pending"
    assert as_json("pause", id)["state"] == "paused"
    assert as_json("resume", id)["state"] == "running"
    assert "cancelled" in run("cancel", id, "--reason", "enough").stdout
    again = run("cancel", id)
    assert_one_sentence(again, 1, "there is nothing to cancel")
    with psycopg.connect(database) as connection:
        found = connection.execute(
            "select action, actor, reason, affected from dovecote.audit_log order by id"
        ).fetchall()
    assert found[0] == ("replay.start", "ada", "INC-7", 2)
    assert [row[0] for row in found] == ["replay.start", "replay.pause", "replay.resume", "replay.cancel"]


def test_ids_come_from_a_file(database: str, as_json: AsJson, tmp_path: Path) -> None:
    with psycopg.connect(database) as connection:
        rows = connection.execute("select id from dovecote.outbox order by position offset 2").fetchall()
    file = tmp_path / "ids"
    file.write_text("".join(f"{id}\n" for (id,) in rows) + "\n")

    plan = as_json("start", "--handler", HANDLER, "--reason", "a test", "--ids-from", str(file), "--dry-run")

    assert (plan["events"], plan["first_position"]) == (1, 3)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--handler", "nobody"), 2, "there is no handler 'nobody'"),
        (("--handler", HANDLER, "--type", "pricing.price_quoted.v1"), 2, "does not take 'pricing.price_quoted.v1'"),
        (("--handler", HANDLER, "--since", "yesterday"), 2, "'yesterday' is no time: give ISO 8601"),
        (("--handler", HANDLER, "--until", "0026-11-20"), 2, "a year has four digits"),
        (("--handler", HANDLER, "--actor", " "), 2, "who does this?"),
        (("--handler", HANDLER, "--ids-from", "nowhere"), 2, "nowhere: it cannot be read"),
        (("--handler", HANDLER, "--ids-from", "bad"), 2, "bad, line 2: 'seven' is no event id"),
        (("--handler", HANDLER, "--until", "2001-01-01"), 1, "there is nothing to replay"),
        (
            ("--handler", "verification.send_code", "--mode", "reprocess"),
            1,
            "the code was not requested a second time",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    run: Run, tmp_path: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    (tmp_path / "bad").write_text("01900000-0000-7000-8000-000000000001\nseven\n")

    done = run("start", "--reason", "a test", *words)

    assert done.returncode == code, done.stderr
    assert sentence in " ".join(done.stderr.replace("\u2502", " ").split())
    assert "Traceback" not in done.stderr


def test_a_reason_is_printed_as_it_was_given_and_a_list_goes_on_where_a_page_ended(run: Run, as_json: AsJson) -> None:
    first = as_json("start", "--handler", HANDLER, "--reason", "no [/markup]")["replay_id"]
    run("cancel", first)
    as_json("start", "--handler", HANDLER, "--since", "1h", "--reason", "ages are taken")

    listed = run("list", "--limit", "1").stdout

    assert "ages are taken" in listed
    before = listed.split("more: --before ")[1].strip()
    assert "no [/markup]" in run("list", "--before", before).stdout
    assert "no [/markup]" in run("show", first).stdout
