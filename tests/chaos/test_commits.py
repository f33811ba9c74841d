"""The proxy loses the reply to a commit after Postgres has committed, and nothing else."""

import itertools
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import make_url

from tests.chaos.commits import PostgresProxy, Replies


@pytest.fixture
def proxy(fresh_database_url: str) -> Iterator[PostgresProxy]:
    port = make_url(fresh_database_url).port
    assert port is not None
    with psycopg.connect(fresh_database_url) as connection:
        connection.execute("create table kept (n int)")
    with PostgresProxy(port) as proxy:
        yield proxy


def connect(proxy: PostgresProxy, url: str, *, autocommit: bool) -> psycopg.Connection:
    return psycopg.connect(f"{proxy.through(url)}?sslmode=disable&gssencmode=disable", autocommit=autocommit)


def kept(url: str) -> list[int]:
    with psycopg.connect(url) as connection:
        return [n for (n,) in connection.execute("select n from kept order by n")]


@pytest.mark.parametrize("autocommit", [False, True])
def test_a_commit_whose_reply_is_lost_has_happened(
    proxy: PostgresProxy, fresh_database_url: str, autocommit: bool
) -> None:
    connection = connect(proxy, fresh_database_url, autocommit=autocommit)
    proxy.lose_commit_replies(1)

    if not autocommit:
        connection.execute("insert into kept values (1)")
    with pytest.raises(psycopg.OperationalError):
        connection.execute("insert into kept values (1)") if autocommit else connection.commit()

    assert kept(fresh_database_url) == [1]
    assert proxy.lost == 1
    with connect(proxy, fresh_database_url, autocommit=False) as another:
        another.execute("insert into kept values (2)")
    assert kept(fresh_database_url) == [1, 2], "only one was to be lost"


def test_what_is_no_commit_passes(proxy: PostgresProxy, fresh_database_url: str) -> None:
    connection = connect(proxy, fresh_database_url, autocommit=False)
    proxy.lose_commit_replies(1)

    connection.execute("insert into kept values (1)")
    assert connection.execute("select n from kept").fetchall() == [(1,)]
    connection.rollback()

    assert proxy.lost == 0
    assert kept(fresh_database_url) == []


COMMITTED = b"C\x00\x00\x00\x0bCOMMIT\x00" + b"Z\x00\x00\x00\x05I"
INSERTED = b"C\x00\x00\x00\x0fINSERT 0 1\x00" + b"Z\x00\x00\x00\x05T"


CUTS = list(itertools.combinations(range(1, len(INSERTED + COMMITTED)), 2))


def test_messages_that_come_in_pieces_are_parsed_one_by_one() -> None:
    stream = INSERTED + COMMITTED
    for cuts in CUTS:
        replies, passed, found = Replies(), b"", False
        for start, stop in itertools.pairwise([0, *cuts, len(stream)]):
            assert not found, "nothing comes after it"
            some, found = replies.feed(stream[start:stop], lose=True)
            passed += some

        assert (passed, found) == (INSERTED, True), cuts
