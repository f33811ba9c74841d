"""`dovecote maintain` and `partitions` as an operator meets them, and the relay that does the same by itself."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from typer.testing import CliRunner, Result

from dovecote.cli import app
from dovecote.operations.validation import WrongRequest
from dovecote.store.connections import connect
from tests.conftest import Servers, settings_for
from tests.support.past_weeks import an_old_id, fail, process, publish_all, subscribe, suffix, write_old
from tests.support.processes import eventually
from tests.support.system import system_for

Run = Callable[..., Result]


@pytest.fixture
def engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def run(fresh_database_url: str, tmp_path: Path) -> Run:
    def run(*words: str, catch_exceptions: bool = True) -> Result:
        return CliRunner().invoke(
            app,
            words,
            env={"DATABASE_URL": fresh_database_url, "DOVECOTE_HOME": str(tmp_path), "COLUMNS": "200"},
            catch_exceptions=catch_exceptions,
        )

    return run


def two_old_weeks(engine: Engine, handler: str = "pricing.apply_quotes") -> None:
    """One that is done and one with a dead event."""
    done, dead = an_old_id(8), an_old_id(7)
    subscribe(engine, handler)
    with engine.begin() as connection:
        write_old(connection, [done, dead])
        publish_all(connection)
        process(connection, [done], handler)
        fail(connection, dead, "dead", handler)


def printed(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_maintain_drops_what_may_go_and_says_what_holds_back_the_rest(engine: Engine, run: Run, tmp_path: Path) -> None:
    two_old_weeks(engine)

    result = run("maintain", "--keep-weeks", "2", "--archive-dir", str(tmp_path / "archive"))

    assert result.exit_code == 1
    assert f"week {suffix(8)} is dropped: 1 events, archived in {tmp_path}/archive/{suffix(8)}-" in result.stdout
    assert f"week {suffix(7)} is not dropped, it is still needed:" in result.stdout
    assert "1 dead for pricing.apply_quotes" in result.stdout
    assert "retry or discard them" in result.stdout


def test_maintain_in_json(engine: Engine, run: Run) -> None:
    two_old_weeks(engine)
    run("maintain")

    dry = printed(run("maintain", "--keep-weeks", "2", "--dry-run", "--json"))
    wet = printed(run("maintain", "--keep-weeks", "2", "--json"))

    assert dry["dry_run"] is True
    assert [week["week"] for week in dry["dropped"]] == [suffix(8)]
    assert [week["week"] for week in wet["dropped"]] == [suffix(8)]
    assert wet["held"][0]["blockers"][0]["handler"] == "pricing.apply_quotes"


def test_maintain_drops_nothing_without_a_number_of_weeks_to_keep(engine: Engine, run: Run) -> None:
    two_old_weeks(engine)

    result = run("maintain")

    assert result.exit_code == 0
    assert "no week is dropped: give --keep-weeks" in result.stdout
    assert "6 rows moved" not in result.stdout
    assert "5 rows moved into their weeks" in result.stdout


def test_a_handler_without_a_route_is_named_and_can_be_forgotten(engine: Engine, run: Run) -> None:
    old = an_old_id(8)
    subscribe(engine, "test.gone")
    with engine.begin() as connection:
        write_old(connection, [old])
        publish_all(connection)

    result = run("maintain", "--keep-weeks", "2")
    assert result.exit_code == 1
    assert "--unsubscribe test.gone" in result.stdout

    assert "1 subscriptions of test.gone would end" in run("maintain", "--unsubscribe", "test.gone", "--dry-run").stdout
    assert run("maintain", "--keep-weeks", "2", "--unsubscribe", "test.gone").exit_code == 0
    for handler, refusal in (("test.gone", "has subscriptions"), ("pricing.apply_quotes", "has a route")):
        with pytest.raises(WrongRequest, match=refusal):
            run("maintain", "--unsubscribe", handler, catch_exceptions=False)


def test_partitions_for_people_and_machines(engine: Engine, run: Run) -> None:
    two_old_weeks(engine)
    run("maintain")

    result = run("partitions", "--keep-weeks", "2")
    found = printed(run("partitions", "--keep-weeks", "2", "--json"))

    assert result.exit_code == 0
    assert "nothing at a glance" in result.stdout
    assert "1 dead for pricing.apply_quotes" in result.stdout
    assert "partitions reach 4 weeks beyond this one" in result.stdout
    assert found["headroom_weeks"] == 4
    assert [week["is_old"] for week in found["weeks"][:3]] == [True, True, False]


def test_the_relay_looks_after_the_weeks_by_itself(
    engine: Engine, fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    two_old_weeks(engine)
    settings = settings_for(
        fresh_database_url,
        servers.redis_url,
        tmp_path,
        DOVECOTE_RETENTION__KEEP_WEEKS="2",
        DOVECOTE_RETENTION__ARCHIVE_PATH=str(tmp_path / "archive"),
    )

    def dropped() -> list[str]:
        with engine.connect() as connection:
            return list(connection.execute(text("select week from dovecote.dropped_partitions")).scalars())

    with system_for(settings, []) as system, system.relay():
        eventually(dropped, 30, "a week dropped by the relay")

    assert dropped() == [suffix(8)]
    assert [path.name.split("-")[0] for path in (tmp_path / "archive").iterdir()] == [suffix(8)]
