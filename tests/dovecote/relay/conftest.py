"""Systems, and connections for readers and for writers whose transactions end when the test says so."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from dovecote.route import Route
from tests.conftest import Servers, settings_for
from tests.support.effects import a_route, make_room_for_effects
from tests.support.outbox_rows import Connection
from tests.support.system import System, system_for


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


@pytest.fixture
def system_with(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[Callable[..., System]]:
    """Builds this test's system; settings are given by their long names without the prefix."""
    with ExitStack() as stack:

        def build(*routes: Route, **settings: object) -> System:
            variables = {f"DOVECOTE_{name}": str(value) for name, value in settings.items()}
            settings_ = settings_for(fresh_database_url, servers.redis_url, tmp_path, **variables)
            system = stack.enter_context(system_for(settings_, routes or (a_route(),)))
            make_room_for_effects(system.engine)
            return system

        yield build
