"""Old weeks are dropped whole once nothing needs them; until then they stay, and say why."""

import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from dovecote import processed_events
from dovecote.operations import archive, retention
from dovecote.operations.retention import Archived, Maintenance
from dovecote.store.connections import connect, sessions_for
from tests.support.past_weeks import an_old_id, fail, process, publish_all, subscribe, suffix, write_old
from tests.support.processes import eventually

pytestmark = pytest.mark.servers

TABLES = ("outbox", "processed_events", "published_batches")


@pytest.fixture
def engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url, pool_size=5)
    yield engine
    engine.dispose()


def an_old_week(engine: Engine, weeks_ago: int = 6, events: int = 5) -> list[UUID]:
    """A week of events that are published and processed."""
    ids = [an_old_id(weeks_ago, hours=1 + n) for n in range(events)]
    with engine.begin() as connection:
        write_old(connection, ids)
        publish_all(connection)
        process(connection, ids)
    return ids


def maintain(
    engine: Engine, archive_dir: Path | None = None, keep_weeks: int = 2, dry_run: bool = False
) -> Maintenance:
    return retention.maintain(engine, actor="a test", keep_weeks=keep_weeks, archive_dir=archive_dir, dry_run=dry_run)


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"select count(*) from dovecote.{table}")).scalar_one())


def there(engine: Engine, week: str) -> set[str]:
    with engine.connect() as connection:
        return {
            table
            for table in TABLES
            if connection.execute(text("select to_regclass(:name)"), {"name": f"dovecote.{table}_{week}"}).scalar_one()
        }


# Dropping -----------------------------------------------------------------------------------------


def test_a_week_that_is_done_goes_with_its_dedup_and_its_batches(engine: Engine) -> None:
    subscribe(engine)
    an_old_week(engine, 6)
    kept = an_old_week(engine, 1)

    done = maintain(engine)

    assert [(week.week, week.events) for week in done.dropped] == [(suffix(6), 5)]
    assert done.held == []
    assert there(engine, suffix(6)) == set()
    assert there(engine, suffix(1)) == set(TABLES)
    assert [count(engine, table) for table in TABLES] == [len(kept)] * 3


def test_who_dropped_what_is_on_record(engine: Engine) -> None:
    an_old_week(engine)

    maintain(engine)

    with engine.connect() as connection:
        row = connection.execute(text("select * from dovecote.dropped_partitions")).one()
        audited = connection.execute(
            text("select actor, action, details from dovecote.audit_log where action = 'partition.dropped'")
        ).one()
    assert (row.week, row.events, row.processed, row.actor, row.archive) == (suffix(6), 5, 5, "a test", None)
    assert row.last_position - row.first_position == 4
    assert (audited.actor, audited.action, audited.details["week"]) == ("a test", "partition.dropped", suffix(6))


def test_nothing_is_dropped_unless_asked(engine: Engine) -> None:
    an_old_week(engine)

    assert not maintain(engine, keep_weeks=0).dropped
    assert there(engine, suffix(6)) == set(TABLES)


def test_a_dry_run_says_what_would_go_and_changes_nothing(engine: Engine) -> None:
    subscribe(engine)
    an_old_week(engine, 6)
    an_old_week(engine, 5)
    maintain(engine, keep_weeks=0)
    with engine.begin() as connection:
        late = an_old_id(5)
        write_old(connection, [late])
        publish_all(connection)

    done = maintain(engine, dry_run=True)

    assert [week.week for week in done.dropped] == [suffix(6)]
    assert [week.week for week in done.held] == [suffix(5)]
    assert count(engine, "outbox") == 11


# Holding back -------------------------------------------------------------------------------------


def held_by(engine: Engine) -> list[tuple[str | None, str, int]]:
    done = maintain(engine)
    assert done.dropped == []
    (week,) = done.held
    assert there(engine, week.week) == set(TABLES)
    return [(one.handler, one.what, one.events) for one in week.blockers]


@pytest.mark.parametrize("state", ["retrying", "waiting", "dead"])
def test_a_week_with_a_failure_in_it_stays(engine: Engine, state: str) -> None:
    ids = an_old_week(engine)
    with engine.begin() as connection:
        connection.execute(text("delete from dovecote.processed_events where event_id = :id"), {"id": ids[2]})
        fail(connection, ids[2], state)

    assert held_by(engine) == [("test.note", state, 1)]


def test_a_discarded_failure_goes_with_its_week_and_into_its_archive(engine: Engine, tmp_path: Path) -> None:
    subscribe(engine)
    ids = an_old_week(engine)
    with engine.begin() as connection:
        connection.execute(text("delete from dovecote.processed_events where event_id = :id"), {"id": ids[2]})
        fail(connection, ids[2], "discarded")

    done = maintain(engine, tmp_path)

    assert count(engine, "deliveries") == 0
    (row,) = archive.rows(Path(str(done.dropped[0].archive)), "discarded_deliveries")
    assert row["event_id"] == str(ids[2])


def test_a_week_with_an_unpublished_event_stays(engine: Engine) -> None:
    an_old_week(engine)
    with engine.begin() as connection:
        write_old(connection, [an_old_id(6)])

    assert held_by(engine) == [(None, "unpublished", 1)]


def test_a_week_that_a_subscriber_has_not_done_stays_until_it_has(engine: Engine) -> None:
    ids = an_old_week(engine)
    subscribe(engine, "test.another")

    assert held_by(engine) == [("test.another", "unprocessed", 5)]
    with engine.begin() as connection:
        process(connection, ids, "test.another")
    assert [week.week for week in maintain(engine).dropped] == [suffix(6)]


def test_what_a_handler_was_never_to_have_holds_nothing_back(engine: Engine) -> None:
    an_old_week(engine)
    subscribe(engine, "test.newcomer", since=1_000)

    assert maintain(engine).held == []


def test_an_unknown_version_of_a_known_event_holds_its_week_back(engine: Engine) -> None:
    subscribe(engine)
    an_old_week(engine)
    with engine.begin() as connection:
        write_old(connection, [an_old_id(6)], "test.noted.v2")
        write_old(connection, [an_old_id(6)], "test.nobody_asks.v1")
        publish_all(connection)

    assert held_by(engine) == [("test.note", "unknown version", 1)]


@pytest.mark.parametrize("state", ["pending", "running", "paused"])
def test_a_replay_that_has_not_passed_a_week_holds_it_back(engine: Engine, state: str) -> None:
    subscribe(engine)
    an_old_week(engine)
    with engine.begin() as connection:
        connection.execute(
            text(
                "insert into dovecote.replays"
                " (actor, reason, mode, handler_name, filter, state, cursor_position)"
                " values ('a test', 'because', 'backfill', 'test.note', '{}', :state, 4)"
            ),
            {"state": state},
        )

    assert held_by(engine) == [("test.note", "replay", 1)]
    with engine.begin() as connection:
        connection.execute(text("update dovecote.replays set cursor_position = 5"))
    assert len(maintain(engine).dropped) == 1


def test_a_forgotten_handler_holds_nothing_back(engine: Engine) -> None:
    an_old_week(engine)
    subscribe(engine, "test.gone")
    assert held_by(engine) == [("test.gone", "unprocessed", 5)]

    assert retention.unsubscribe_handler(engine, "test.gone", actor="a test") == 1

    assert len(maintain(engine).dropped) == 1


def test_nobody_drops_a_week_that_is_needed_or_young_by_calling_the_function(engine: Engine) -> None:
    an_old_week(engine)
    subscribe(engine, "test.another")

    with (
        pytest.raises(DBAPIError, match=r"is still needed: 5 unprocessed for test\.another"),
        engine.begin() as connection,
    ):
        connection.execute(text("select dovecote.drop_partition(:week, 'me')"), {"week": retention_week(engine)})
    with pytest.raises(DBAPIError, match="too young"), engine.begin() as connection:
        connection.execute(text("select dovecote.drop_partition(:week, 'me')"), {"week": suffix(0)})


def retention_week(engine: Engine) -> str:
    maintain(engine, keep_weeks=0)
    return suffix(6)


def test_a_transaction_that_still_writes_into_a_week_keeps_it(engine: Engine) -> None:
    an_old_week(engine)
    maintain(engine, keep_weeks=0)
    with engine.connect() as writer:
        writer.execute(text("set session_replication_role = replica"))  # past the triggers, without a table lock
        writer.execute(
            text("insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload)"
                 " values (:id, 'a', 'b', 'test.noted.v1', '{}')"),
            {"id": an_old_id(6)},
        )  # fmt: skip
        with pytest.raises(DBAPIError, match="lock timeout"):
            maintain(engine)
        assert there(engine, suffix(6)) == set(TABLES)
        writer.rollback()

    assert len(maintain(engine).dropped) == 1


# After it is gone ---------------------------------------------------------------------------------


def test_a_message_of_a_dropped_week_is_new_to_nobody(engine: Engine) -> None:
    ids = an_old_week(engine)
    maintain(engine)

    with sessions_for(engine)() as session, session.begin():
        assert processed_events.mark(session, "test.note", ids) == set(ids)
    assert count(engine, "processed_events") == 0


def test_an_event_of_a_dropped_week_is_refused_in_words(engine: Engine) -> None:
    an_old_week(engine)
    maintain(engine)

    with pytest.raises(DBAPIError, match="a week that was dropped"), engine.begin() as connection:
        write_old(connection, [an_old_id(6)])


def test_asking_for_what_is_gone_names_the_archive(engine: Engine, tmp_path: Path) -> None:
    an_old_week(engine, 6)
    an_old_week(engine, 1)
    done = maintain(engine, tmp_path)
    with engine.connect() as connection:
        first, last = connection.execute(
            text("select first_created_at, last_created_at from dovecote.dropped_partitions")
        ).one()

        for bounds in ({"since": last}, {"until": last}, {"after_position": 3}, {"upto_position": 2}):
            with pytest.raises(Archived, match=str(done.dropped[0].archive)):
                retention.require_present(connection, **bounds)
        for bounds in ({}, {"since": last.replace(year=last.year + 1)}, {"until": first}, {"after_position": 5}):
            retention.require_present(connection, **bounds)


# Archives -----------------------------------------------------------------------------------------


def test_the_archive_has_exactly_what_was_dropped(engine: Engine, tmp_path: Path) -> None:
    subscribe(engine)
    ids = an_old_week(engine)

    (week,) = maintain(engine, tmp_path / "new" / "place").dropped

    found = archive.read(Path(str(week.archive)))
    assert found.checksum == week.checksum
    assert found.rows == {"outbox": 5, "processed_events": 5, "published_batches": 5, "discarded_deliveries": 0}
    assert [row["id"] for row in archive.rows(found.path, "outbox")] == [str(one) for one in ids]
    assert {row["event_id"] for row in archive.rows(found.path, "processed_events")} == {str(one) for one in ids}
    assert next(archive.rows(found.path, "outbox"))["payload"] == {"n": 1}
    assert json.loads((found.path / "manifest.json").read_text())["week"] == suffix(6)
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]


def test_a_run_killed_between_archive_and_drop_is_gone_over_cleanly(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_old_week(engine)
    write = archive.write

    def killed_after(*given: object) -> archive.Archive:
        write(*given)  # type: ignore[arg-type]  # passed on as it came
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "write", killed_after)
    with pytest.raises(KeyboardInterrupt):
        maintain(engine, tmp_path)
    assert there(engine, suffix(6)) == set(TABLES)
    (left,) = tmp_path.iterdir()
    monkeypatch.undo()

    (week,) = maintain(engine, tmp_path).dropped

    assert week.archive == str(left)
    assert list(tmp_path.iterdir()) == [left]


def test_a_directory_that_cannot_be_written_drops_nothing(engine: Engine, tmp_path: Path) -> None:
    an_old_week(engine)
    (tmp_path / "file").write_text("")

    with pytest.raises(archive.CannotArchive, match="could not be written"):
        maintain(engine, tmp_path / "file")

    assert there(engine, suffix(6)) == set(TABLES)


def test_a_damaged_archive_is_found_out(tmp_path: Path) -> None:
    made = archive.write(tmp_path, "2026w01", {}, {"outbox": ['{"a": 1}', '{"a": 2}']})
    assert archive.read(made.path).rows == {"outbox": 2}

    file = made.path / "outbox.jsonl.gz"
    with gzip.open(file, "wb") as packed:
        packed.write(b'{"a": 1}\n')
    with pytest.raises(archive.CannotArchive, match="damaged"):
        archive.read(made.path)
    file.write_bytes(b"no gzip")
    with pytest.raises(archive.CannotArchive):
        archive.read(made.path)


# Rows before their partition -----------------------------------------------------------------------


def test_rows_that_came_before_their_partition_are_moved_into_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BATCH_ROWS", 2)
    ids = an_old_week(engine, 3) + an_old_week(engine, 4)
    before = rows(engine)
    assert count(engine, "outbox_default") == len(ids)

    done = maintain(engine, keep_weeks=0)

    assert done.moved == 3 * len(ids)
    assert [count(engine, f"{table}_default") for table in TABLES] == [0, 0, 0]
    assert rows(engine) == before
    assert there(engine, suffix(3)) == there(engine, suffix(4)) == set(TABLES)
    assert maintain(engine, keep_weeks=0).moved == 0


def rows(engine: Engine) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [
            tuple(row) for row in connection.execute(text("select * from dovecote.outbox_events order by position"))
        ]


def test_a_moved_partition_has_the_indexes_and_triggers_of_the_others(engine: Engine) -> None:
    an_old_week(engine)
    maintain(engine, keep_weeks=0)

    with engine.connect() as connection:
        found = {
            week: connection.execute(
                text(
                    "select (select count(*) from pg_index where indrelid = t.oid and indisvalid),"
                    " (select count(*) from pg_trigger where tgrelid = t.oid),"
                    " (select count(*) from pg_constraint where conrelid = t.oid and contype = 'c')"
                    " from pg_class t where t.oid = cast(:name as regclass)"
                ),
                {"name": f"dovecote.outbox_{suffix(week)}"},
            ).one()
            for week in (0, 6)
        }
    assert found[6] == found[0]
    with pytest.raises(DBAPIError, match="more than a day"), engine.begin() as connection:
        connection.execute(
            text("insert into dovecote.outbox (id, aggregate_type, aggregate_id, event_type, payload)"
                 " values (:id, 'a', 'b', 'c.d.v1', '{}')"), {"id": an_old_id(6)},
        )  # fmt: skip


def test_what_is_written_between_copying_and_placing_is_moved_too(engine: Engine) -> None:
    an_old_week(engine)
    with engine.begin() as connection:
        assert connection.execute(text("select dovecote.copy_misplaced_rows()")).scalar_one() == 5
        assert connection.execute(text("select dovecote.copy_misplaced_rows()")).scalar_one() == 5
        assert connection.execute(text("select dovecote.copy_misplaced_rows()")).scalar_one() == 0
    an_old_week(engine, events=1)

    assert maintain(engine, keep_weeks=0).moved == 18
    assert count(engine, f"outbox_{suffix(6)}") == 6


# Beside writers -----------------------------------------------------------------------------------


def test_writers_go_on_while_a_week_is_dropped_beside_a_long_transaction(engine: Engine) -> None:
    an_old_week(engine)
    maintain(engine, keep_weeks=0)
    reading, done = threading.Event(), threading.Event()

    def read_long() -> None:
        with engine.connect() as reader:
            reader.execute(text("select count(*) from dovecote.outbox"))
            reading.set()
            done.wait(60)

    reader = threading.Thread(target=read_long)
    reader.start()
    reading.wait(10)
    outcome: list[Maintenance] = []
    dropping = threading.Thread(target=lambda: outcome.append(maintain(engine)))
    dropping.start()
    for _ in range(50):
        with engine.begin() as connection:
            connection.execute(text("select dovecote.append_event('a', 'b', 'test.noted.v1', '{}')"))
    assert not outcome, "the reader holds the week"
    done.set()
    reader.join(20)
    dropping.join(30)

    assert [week.week for week in outcome[0].dropped] == [suffix(6)]


# Rights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["dovecote_worker", "dovecote_operator"])
def test_the_relay_and_operators_may_do_all_of_it(engine: Engine, role: str, tmp_path: Path) -> None:
    subscribe(engine)
    an_old_week(engine)
    login = f"test_{uuid4().hex[:8]}"
    with engine.begin() as connection:
        connection.execute(text(f"create role {login} login password 'p' in role {role}"))
    own = connect(engine.url.set(username=login, password="p").render_as_string(False))
    try:
        assert retention.list_partitions(own, keep_weeks=2).headroom_weeks == 4
        assert len(maintain(own, tmp_path).dropped) == 1
        with pytest.raises(DBAPIError, match=r"permission denied|must be owner"), own.begin() as connection:
            connection.execute(text(f"drop table dovecote.outbox_{suffix(0)}"))
    finally:
        own.dispose()
        with engine.begin() as connection:
            connection.execute(text(f"drop role {login}"))


def test_partitions_lists_what_is_there(engine: Engine) -> None:
    subscribe(engine)
    an_old_week(engine)
    maintain(engine, keep_weeks=0)
    with engine.begin() as connection:
        write_old(connection, [an_old_id(6)])

    def analyzed() -> retention.Partitions:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("analyze"))
        return retention.list_partitions(engine, keep_weeks=2)

    # A session reports its inserts to the statistics some seconds later: until the next check they count twice.
    eventually(lambda: (analyzed().weeks[0].events, analyzed().weeks[0].processed) == (6, 5), 30, "true statistics")
    found = analyzed()

    old = found.weeks[0]
    assert (old.week, old.is_old) == (suffix(6), True)
    assert old.bytes > 0
    assert [(one.what, one.events, one.at_least) for one in old.blockers] == [("unpublished", 1, False)]
    assert (found.headroom_weeks, found.misplaced_rows) == (4, 0)
