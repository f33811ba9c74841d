"""Connections for readers and for writers whose transactions end when the test says so."""

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.support.outbox_rows import Connection


@pytest.fixture
def url(fresh_database_url: str) -> str:
    return fresh_database_url


@pytest.fixture
def opened(url: str) -> Iterator[Callable[[], Connection]]:
    """Opens connections whose transactions end when the test says so."""
    connections: list[Connection] = []

    def open_one() -> Connection:
        connections.append(psycopg.connect(url))
        return connections[-1]

    yield open_one
    for connection in connections:
        connection.close()


@pytest.fixture
def relays(url: str) -> Iterator[Connection]:
    """The connection a reader reads on."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection
