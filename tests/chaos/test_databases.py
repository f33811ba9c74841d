"""Postgres goes back as far as it is meant to, and no further."""

import psycopg

from tests.chaos.databases import Databases
from tests.support.processes import a_place_for_servers


def test_a_failover_and_a_restored_copy_forget_what_came_after_them_and_nothing_else() -> None:
    with a_place_for_servers() as place:
        databases = Databases(place, {"fsync": "off"})
        try:
            url = databases.start()
            said(url, "create table facts (what text)", "insert into facts values ('before')")

            databases.add_standby()
            said(url, "insert into facts values ('streamed')")
            databases.await_standby()
            databases.stop_streaming()
            said(url, "insert into facts values ('lost with the primary')")
            databases.kill()
            url = databases.promote_standby()

            assert facts(url) == ["before", "streamed"]
            assert timeline(url) == 2

            databases.copy_to(place / "copy")
            said(url, "insert into facts values ('after the copy')")
            databases.kill()
            databases.put_back(place / "copy")
            url = databases.start()

            assert facts(url) == ["before", "streamed"]
            assert timeline(url) == 2
        finally:
            databases.stop()


def said(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def facts(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        return [what for (what,) in connection.execute("select what from facts order by what")]


def timeline(url: str) -> int:
    with psycopg.connect(url) as connection:
        found = connection.execute("select substring(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)").fetchone()
    assert found is not None
    return int(found[0], 16)
