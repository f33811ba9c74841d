"""A whole system on this machine: servers where none are given, the schema, the processes of the Procfile."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from workers import schema
from workers.binaries import ServerError, find_postgres
from workers.embedded import Postgres, Redis, Server
from workers.home import Home
from workers.settings import given_variables, load_settings
from workers.supervisor import Output, Supervisor, parse_procfile
from workers.variables import ALIASES, is_option, long_name, without_options

# Beside us in an installed wheel, at the top level in a checkout.
_PACKAGED = Path(__file__).parent / "Procfile"
PROCFILE = _PACKAGED if _PACKAGED.exists() else Path(__file__).parents[1] / "Procfile"

# SIGTERM lets a consumer finish its bundle; Dramatiq is given 20 s for that in the Procfile.
STOP_SECONDS = 25.0

_PORT = "DOVECOTE_TELEMETRY__HTTP_PORT"


@dataclass(frozen=True)
class LocalSystem:
    """A system ready to run. `environment` is what every process gets; it holds secrets.

    servers    those started here, by the variable that would have given them, with the way to start them again
    data       where the servers keep theirs; not below `home` when their user cannot reach it
    ports      where each process shows its metrics and health; empty when they are turned off
    """

    home: Home
    data: Path
    environment: Mapping[str, str]
    servers: Mapping[str, tuple[Server, Postgres | Redis]]
    processes: Mapping[str, list[str]]
    ports: Mapping[str, int]

    def supervisor(self, output: Output) -> Supervisor:
        """Return a supervisor of the processes that also starts a server again if it ends by itself."""
        own = {name: {_PORT: str(port)} for name, port in self.ports.items()}
        supervisor = Supervisor(self.processes, self.environment, output, own)
        for server, program in self.servers.values():
            _keep(supervisor, output, server, program)
        return supervisor


@contextmanager
def local_system(
    environ: Mapping[str, str], say: Callable[[str], None], procfile: Path = PROCFILE
) -> Iterator[LocalSystem]:
    """Start what is missing, bring the schema up to date and announce the system in its home.

    At the end the servers started here are stopped; their data stays.
    Errors: HomeError, ServerError, NoBinary, ProcfileError, those of the migration.
    """
    processes = parse_procfile(procfile.read_text())
    home = Home.locate(environ)
    home.create()
    with ExitStack() as stack:
        stack.enter_context(home.lock())
        given = {name: value for name, value in given_variables(environ).items() if is_option(name)}
        # Every process would refuse a wrong setting; say so once, before anything runs.
        settings = load_settings(
            {"DATABASE_URL": "postgresql://later", "REDIS_URL": "redis://later", **without_options(environ), **given}
        )
        data = home.servers_path()
        servers: dict[str, tuple[Server, Postgres | Redis]] = {}
        if "DOVECOTE_DATABASE__URL" not in given:
            servers["DATABASE_URL"] = _started(stack, Postgres(data / "postgres", environ=environ))
        if "DOVECOTE_REDIS__URL" not in given:
            servers["REDIS_URL"] = _started(stack, Redis(data / "redis", environ=environ))
        ours = {variable: server.url for variable, (server, _) in servers.items()}
        # The keys stay with the data that they sealed, wherever that is.
        ours |= Home(data if "DATABASE_URL" in servers else home.path).secrets()
        ours["DOVECOTE_SMS__HANDSET_PATH"] = str(home.path / "handset.txt")
        system = {**ours, **given}
        say("bringing the schema up to date")
        schema.upgrade(system.get("DOVECOTE_DATABASE__URL") or system["DATABASE_URL"])
        home.announce(system)
        stack.callback(home.withdraw)
        wanted = settings.telemetry.http_port if _PORT in given else None
        ports = stack.enter_context(_ports(processes, settings.telemetry.http_host, wanted))
        defaults = {"DOVECOTE_TELEMETRY__LOG_FORMAT": "console"}
        yield LocalSystem(
            home=home,
            data=data,
            environment={**defaults, **without_options(environ), **system, "DOVECOTE_HOME": str(home.path)},
            servers=servers,
            processes=processes,
            ports=ports,
        )


def _started(stack: ExitStack, program: Postgres | Redis) -> tuple[Server, Postgres | Redis]:
    stack.callback(program.stop)
    return program.start(), program


@contextmanager
def _ports(names: Iterable[str], host: str, first: int | None) -> Iterator[dict[str, int]]:
    """Give each process a port: from `first` on, one after the other, or free ones; none where `first` is 0."""
    if first is not None:
        yield {name: first + number for number, name in enumerate(names)} if first else {}
        return
    with ExitStack() as held:
        yield {name: _held_port(host, held) for name in names}


def _held_port(host: str, held: ExitStack) -> int:
    """Find a free port and keep it from everybody who looks for one, so that two systems never meet."""
    keeper = held.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
    keeper.bind((host, 0))
    # Now, not before: who binds this very port with the same option, and listens, may have it. That is our child.
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    port: int = keeper.getsockname()[1]
    return port


def _keep(supervisor: Supervisor, output: Output, server: Server, program: Postgres | Redis) -> None:
    name = type(program).__name__.lower()

    def revive() -> None:
        output(name, "ended by itself; starting it again")
        # On the same port: the URL that everybody has stays true.
        _keep(supervisor, output, program.start(server.port), program)

    supervisor.watch(server.pid, revive)


_PSQL = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}


def environment_for_clients(variables: Mapping[str, str]) -> dict[str, str]:
    """Return what lets psql, and whatever reads DATABASE_URL and REDIS_URL, find the system."""
    found = conninfo_to_dict(variables["DATABASE_URL"])
    client = {variable: str(found[key]) for key, variable in _PSQL.items() if found.get(key)}
    # One spelling of each: a nested `dovecote` must not find two.
    others = {name: value for name, value in os.environ.items() if long_name(name) not in ALIASES.values()}
    return {
        **others,
        **variables,
        **client,
        "PGOPTIONS": "-c search_path=dovecote,public",
        "PATH": _with_psql(os.environ.get("PATH", os.defpath)),
    }


def _with_psql(path: str) -> str:
    """Add the psql of the embedded server behind any other: a machine without Postgres has none."""
    try:
        return f"{path}{os.pathsep}{find_postgres(os.environ).path.parent}"
    except ServerError:
        return path
