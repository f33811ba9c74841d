"""A login that may call a function of the owner's gives it arguments without a bound, or keeps what it has locked.

And weeks begin and end in UTC, whatever the session that makes them says.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import psycopg
import pytest

from tests.security.traps import one, session

pytestmark = pytest.mark.servers

_OUT_OF_BOUNDS = {
    "ensure_partitions(400)": "0 to 60 weeks ahead, not for 400",
    "ensure_partitions(-1)": "0 to 60 weeks ahead, not for -1",
    "ensure_partitions(null)": "0 to 60 weeks ahead, not for null",
    "lock_partition(null)": "no partition for week null",
    "lock_partition('../etc')": "no partition for week",
    "lock_partition('2026w99')": "no partition for week",
    "lock_partition('9999w01')": "no partition for week",
    "drop_partition(null, 'me')": "no partition for week null",
    "drop_partition('2026w01', null)": "who drops a week",
    "drop_partition('2026w01', repeat('x', 201))": "who drops a week",
    "drop_partition('2026w01', E'a\\nb')": "who drops a week",
    "drop_partition('2026w01', 'me', repeat('x', 1001), repeat('a', 64), 1, 1)": "1 to 1000 characters",
    "drop_partition('2026w01', 'me', E'/x\\x1b[2J', repeat('a', 64), 1, 1)": "no control characters",
    "drop_partition('2026w01', 'me', '/x', null, 1, 1)": "64 hex digits",
    "drop_partition('2026w01', 'me', null, repeat('a', 64), 1, 1)": "64 hex digits",
    "drop_partition('2026w01', 'me', '/x', 'not it', 1, 1)": "64 hex digits",
    "drop_partition('2026w01', 'me', '/x', repeat('a', 64))": "the numbers of its rows",
    "copy_misplaced_rows(0)": "1 to 100000 rows",
    "copy_misplaced_rows(2147483647)": "1 to 100000 rows",
    "copy_misplaced_rows(null)": "1 to 100000 rows",
    "processed_lately(0)": "1 to 86400 seconds",
    "processed_lately(null)": "1 to 86400 seconds",
    "processed_lately(60, 2147483647)": "1 to 10000 pages",
    "processed_lately(60, -1)": "1 to 10000 pages",
}


@pytest.mark.parametrize("call", _OUT_OF_BOUNDS)
def test_an_argument_out_of_bounds_is_refused_in_words(urls: Mapping[str, str], call: str) -> None:
    with session(urls["operator"]) as operator, pytest.raises(psycopg.Error) as caught:
        operator.execute(f"select dovecote.{call}")

    assert _OUT_OF_BOUNDS[call] in str(caught.value)


@pytest.mark.parametrize("role", ["operator", "worker"])
@pytest.mark.parametrize("verb", ["lock_partition('{week}')", "drop_partition('{week}', 'me')",
                                  "recover('me', 'x')", "ensure_partitions(4)", "place_misplaced_rows()",
                                  "processed_lately(60)"])  # fmt: skip
def test_nobody_stops_writers_by_leaving_a_call_open(urls: Mapping[str, str], role: str, verb: str) -> None:
    with session(urls["owner"]) as owner:
        week = one(owner, "select dovecote.week_suffix(now())")
    with session(urls[role]) as hostile, session(urls["writer"], "set lock_timeout = '1s'") as writer:
        hostile.execute("begin; savepoint before")
        said = "too young" if "week}" in verb else None
        with pytest.raises(psycopg.Error, match=said) if said else nullcontext():
            hostile.execute(f"select dovecote.{verb.format(week=week)}")
        if said:
            hostile.execute("rollback to before")

        one(writer, "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
        locked = one(
            hostile,
            "select count(*) from pg_locks"
            " where pid = pg_backend_pid() and locktype = 'relation' and mode <> 'AccessShareLock'"
            # Whose turn it is to keep weeks in order; no writer asks for it.
            " and relation <> 'dovecote.retention_lock'::regclass",
        )
        assert locked == 0


@pytest.mark.parametrize(
    "setting", ["set timezone = 'Europe/Berlin'", "set timezone = 'Asia/Kolkata'; set datestyle = 'SQL, DMY'"]
)
def test_weeks_begin_on_monday_in_utc_in_any_session(fresh_database_url: str, setting: str) -> None:
    bounds = """
        select c.relname, pg_get_expr(c.relpartbound, c.oid) from pg_class c
        where c.relispartition and c.relkind = 'r' and c.relname ~ '^published' order by 1
    """
    made: list[list[Any]] = []
    with session(fresh_database_url, setting) as hostile, session(fresh_database_url, "set timezone = 'UTC'") as plain:
        for connection in (hostile, plain):
            with connection.transaction(force_rollback=True):
                connection.execute("select dovecote.ensure_partitions(32)")
                connection.execute("set local timezone = 'UTC'; set local datestyle = 'ISO'")
                made.append(connection.execute(bounds).fetchall())

    assert len(made[0]) == 35
    assert made[0] == made[1]
