"""Real servers for every test: given ones, else containers, else embedded. A fresh database per module.

With `-n` (pytest-xdist), every worker has servers of its own: no test finds the connections, locks, transactions or
keys of one that runs beside it. Tests marked `alone` measure the machine: `./dev test` runs them when nothing else
runs. Tests marked `long` need `--long`, or to be named.

Every test runs on the wheels' servers. On Debian's, older ones, run again those marked `servers` and not `once`: whose
outcome hangs on our SQL or Lua or on what the servers answer. What tries Python with a database beside it, starts
processes or servers of its own, kills, measures time or goes at random for long runs once.
"""

import gc
import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, make_url
from sqlalchemy.orm import Session, sessionmaker

from dovecote.local.servers import servers as embedded_servers
from dovecote.settings import Settings, load_settings
from dovecote.store.connections import connect, sessions_for
from tests.support.clusters import TEMPLATE, put_cluster
from tests.support.keys import KEYS
from tests.support.migrations import LOCATIONS
from tests.support.processes import a_place_for_servers, has_enough_memory
from tests.support.profiles import THOROUGH

# Processes that tests start belong to the application of this repository.
os.environ.setdefault("DOVECOTE_APP", "workers.app:app")

# Those of docker-compose.yml.
_POSTGRES_IMAGE = os.environ.get("DOVECOTE_TEST_POSTGRES_IMAGE", "postgres:18.6-trixie")
_REDIS_IMAGE = os.environ.get("DOVECOTE_TEST_REDIS_IMAGE", "redis:8.10.1-trixie")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long`, too")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without collecting garbage: what is made here stays, and to look through it takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = any("::" in word for word in config.args)
    if config.getoption("--long") or named or "long" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether there is time: tests that get stronger by their length ask this."""
    return THOROUGH or bool(request.config.getoption("--long"))


@dataclass(frozen=True)
class Servers:
    """Where tests find Postgres (as a login that may create databases) and Redis."""

    postgres_url: str
    redis_url: str
    origin: str

    def copy(self, name: str, template: str) -> None:
        # Copied files take half the time of pages that go through the log, unless fsync is on.
        strategy = "wal_log" if self.origin == "given" else "file_copy"
        _statement(self, f"create database {{}} template {{}} strategy {strategy}", name, template)

    def database(self, name: str) -> str:
        return make_url(self.postgres_url).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    given = os.environ.get("DATABASE_URL"), os.environ.get("REDIS_URL")
    with ExitStack() as stack:
        if given[0] and given[1]:
            yield Servers(given[0], given[1], os.environ.get("DOVECOTE_TEST_ORIGIN", "given"))
        elif found := _containers(stack):
            yield found
        else:
            place = stack.enter_context(a_place_for_servers())
            put_cluster(place / "postgres")
            postgres, redis = stack.enter_context(
                embedded_servers(place, postgres_settings={"fsync": "off", "max_prepared_transactions": "10"})
            )
            yield Servers(postgres.url, redis.url, "embedded")


def _containers(stack: ExitStack) -> Servers | None:
    """Start containers where a Docker engine answers and has, or can pull, the images.

    With DOVECOTE_TEST_CONTAINERS (tests/containers/run --suite) there are no others: what fails is raised.
    """
    if os.environ.get("DOVECOTE_TEST_EMBEDDED"):
        return None
    socket = Path("/var/run/docker.sock")
    if not (os.environ.get("DOVECOTE_TEST_CONTAINERS") or os.environ.get("DOCKER_HOST") or socket.exists()):
        return None  # before the imports, which take a second
    try:
        import docker
        from testcontainers.community.postgres import PostgresContainer
        from testcontainers.community.redis import RedisContainer

        engine = docker.from_env(timeout=5)
        for image in (_POSTGRES_IMAGE, _REDIS_IMAGE):
            if not engine.images.list(name=image):
                engine.images.pull(image)
        # As the embedded servers: in memory, where there is enough, and without fsync. No test cuts the power.
        postgres = PostgresContainer(_POSTGRES_IMAGE, driver=None)
        postgres.with_command("postgres -c fsync=off -c max_prepared_transactions=10")
        if has_enough_memory():
            postgres.with_tmpfs_mount("/var/lib/postgresql", "mode=1777")
        stack.enter_context(postgres)
        redis: Any = stack.enter_context(RedisContainer(_REDIS_IMAGE))
    except Exception as error:
        if os.environ.get("DOVECOTE_TEST_CONTAINERS"):
            raise
        # No engine, no image, no network: the embedded servers are as real.
        print(f"containers are left out: {type(error).__name__}")  # noqa: T201
        return None
    redis_url = f"redis://{redis.get_container_host_ip()}:{redis.get_exposed_port(6379)}/0"
    return Servers(postgres.get_connection_url(), redis_url, "containers")


@pytest.fixture(scope="session")
def template(servers: Servers) -> Iterator[str]:
    """The name of a migrated database that others are copied from; ./dev mutations has one for all its runs."""
    if given := os.environ.get("DOVECOTE_TEST_TEMPLATE"):
        yield given
        return
    if servers.origin == "embedded":
        yield TEMPLATE
        return
    from dovecote.migrations import schema  # Alembic takes half a second to import

    name = f"dovecote_template_{uuid4().hex[:8]}"
    _statement(servers, "create database {}", name)
    schema.upgrade(servers.database(name), locations=LOCATIONS)
    yield name
    _statement(servers, "drop database {}", name)


@pytest.fixture(scope="module")
def database_url(servers: Servers, template: str) -> Iterator[str]:
    """A migrated database of this module's own."""
    name = f"dovecote_test_{uuid4().hex[:8]}"
    servers.copy(name, template)
    yield servers.database(name)
    _statement(servers, "drop database {} with (force)", name)


@pytest.fixture
def fresh_database_url(servers: Servers, template: str) -> Iterator[str]:
    """A migrated database of this test's own."""
    name = f"dovecote_test_{uuid4().hex[:8]}"
    servers.copy(name, template)
    yield servers.database(name)
    _statement(servers, "drop database {} with (force)", name)


@pytest.fixture
def empty_database_url(servers: Servers) -> Iterator[str]:
    """A database that was never migrated."""
    name = f"dovecote_test_{uuid4().hex[:8]}"
    _statement(servers, "create database {}", name)
    yield servers.database(name)
    _statement(servers, "drop database {} with (force)", name)


@pytest.fixture(scope="module")
def engine(database_url: str) -> Iterator[Engine]:
    engine = connect(database_url, pool_size=20)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def sessions(engine: Engine) -> sessionmaker[Session]:
    return sessions_for(engine)


def settings_for(database_url: str, redis_url: str, home: Path, **more: str) -> Settings:
    """Settings of a system of its own: its own keys in Redis, known secrets."""
    return load_settings(
        {
            "DOVECOTE_HOME": str(home),
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "DOVECOTE_REDIS__NAMESPACE": f"test-{uuid4().hex[:8]}",
            **KEYS,
            "DOVECOTE_CONSUMERS__POLL_INTERVAL_MS": "100",
            "DOVECOTE_SMS__HANDSET_PATH": str(home / "handset.txt"),
            **more,
        },
        directory=home,
    )


@pytest.fixture
def settings(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Settings:
    """Settings of a system on a database and a Redis namespace of this test's own."""
    return settings_for(fresh_database_url, servers.redis_url, tmp_path)


def _statement(servers: Servers, statement: str, *names: str) -> None:
    with psycopg.connect(servers.postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))
