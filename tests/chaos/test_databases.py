"""Postgres goes back as far as it is meant to, and no further."""

import psycopg

from tests.chaos.databases import Databases
from tests.support.processes import a_place_for_servers


def test_a_failover_and_a_restored_copy_forget_what_came_after_them_and_nothing_else() -> None:
    with a_place_for_servers() as place:
        databases = Databases(place, {"fsync": "off"})
        try:
            url = databases.start()
            execute(url, "create table rows (what text)", "insert into rows values ('before')")

            databases.add_standby()
            execute(url, "insert into rows values ('streamed')")
            databases.await_standby()
            databases.stop_streaming()
            execute(url, "insert into rows values ('lost with the primary')")
            databases.kill()
            url = databases.promote_standby()

            assert rows(url) == ["before", "streamed"]
            assert timeline(url) == 2

            databases.copy_to(place / "copy")
            execute(url, "insert into rows values ('after the copy')")
            databases.kill()
            databases.put_back(place / "copy")
            url = databases.start()

            assert rows(url) == ["before", "streamed"]
            assert timeline(url) == 2
        finally:
            databases.stop()


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def rows(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        return [what for (what,) in connection.execute("select what from rows order by what")]


def timeline(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute("select substring(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)").fetchone()
    assert found is not None
    return int(found[0], 16)
