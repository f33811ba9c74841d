"""A connection is never given to the next one in a transaction of somebody else's."""

from typing import NoReturn

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from sqlalchemy import event, text

from dovecote.store.connections import connect
from dovecote.store.watched import Connection

pytestmark = pytest.mark.servers


def test_a_commit_that_is_refused_leaves_no_transaction_open(database_url: str) -> None:
    with Connection.connect(database_url) as connection:
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("select 1 / 0")

        with pytest.raises(psycopg.errors.InFailedSqlTransaction, match="the error was caught"):
            connection.commit()

        assert connection.info.transaction_status == TransactionStatus.IDLE


def test_what_sqlalchemy_takes_for_ended_goes_back_to_the_pool_without_its_transaction(database_url: str) -> None:
    def fail(_connection: object) -> NoReturn:
        raise ZeroDivisionError

    engine = connect(database_url, pool_size=1)
    event.listen(engine, "commit", fail)
    with engine.connect() as connection:
        connection.execute(text("select 1"))
        driver = connection.connection.driver_connection
        with pytest.raises(ZeroDivisionError):
            connection.commit()
        assert isinstance(driver, Connection)
        before_and_after = [driver.info.transaction_status]
    before_and_after.append(driver.info.transaction_status)
    engine.dispose()

    assert before_and_after == [TransactionStatus.INTRANS, TransactionStatus.IDLE]
