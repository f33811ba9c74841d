"""A whole system on this machine: servers where none are given, the schema, the processes of the Procfile."""

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from dovecote.local.servers import Postgres, Redis, Server
from dovecote.local.supervisor import Output, Supervisor, parse_procfile
from dovecote.migrations import schema
from dovecote.processes.ownership import NotOurs, read_ours
from dovecote.processes.state_directory import StateDirectory
from dovecote.route import Dovecote
from dovecote.settings import SettingsError, given_variables, load_settings
from dovecote.settings.application import VARIABLE as APP_VARIABLE
from dovecote.settings.application import load_app
from dovecote.settings.variables import is_option, without_options

# A relay and consumers of every queue: right for any application.
_PACKAGED_PROCFILE = Path(__file__).parent / "Procfile"

# SIGTERM lets a consumer finish its bundle; Dramatiq is given 20 s for that in the Procfile.
STOP_SECONDS = 25.0

_KNOWS_REQUIRE_AUTH = 160_000
_PORT = "DOVECOTE_TELEMETRY__HTTP_PORT"


@dataclass(frozen=True)
class LocalSystem:
    """A system ready to run. `environment` is what every process gets; it holds secrets.

    servers    those started here, by the variable that would have given them, with the way to start them again
    data       where the servers keep theirs; not below `home` when their user cannot reach it
    ports      where each process shows its metrics and health; empty when they are turned off
    """

    app: Dovecote
    home: StateDirectory
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
    environ: Mapping[str, str], say: Callable[[str], None], app_name: str, procfile: Path | None = None
) -> Iterator[LocalSystem]:
    """Start what is missing, bring the schema up to date and announce the system in its home.

    At the end the servers started here are stopped; their data stays.
    Errors: StateDirectoryError, ServerError, NoBinary, SettingsError, ProcfileError, those of the migration.
    """
    app = load_app(app_name)
    processes = parse_procfile(_procfile(app, procfile))
    home = StateDirectory.locate(environ)
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
        if "DATABASE_URL" in ours and psycopg.pq.version() >= _KNOWS_REQUIRE_AUTH:
            # A process that binds the port while our server is down could ask for the password in clear.
            ours["DATABASE_URL"] += "?require_auth=scram-sha-256"
        # The keys stay with the data that they encrypted, wherever that is.
        ours |= StateDirectory(data if "DATABASE_URL" in servers else home.path).secrets()
        ours["DOVECOTE_SMS__HANDSET_PATH"] = str(home.path / "handset.txt")
        # Announced with the rest: the commands beside us work on the same application.
        system = {**ours, **given, APP_VARIABLE: app_name}
        say("bringing the schema up to date")
        url = system.get("DOVECOTE_DATABASE__URL") or system["DATABASE_URL"]
        schema.upgrade(url, locations=app.migration_locations)
        if "DATABASE_URL" in servers:
            schema.keep_strangers_out(ours["DATABASE_URL"])
        home.announce(system)
        stack.callback(home.withdraw)
        wanted = settings.telemetry.http_port if _PORT in given else None
        ports = stack.enter_context(_ports(processes, settings.telemetry.http_host, wanted))
        defaults = {"DOVECOTE_TELEMETRY__LOG_FORMAT": "console"}
        yield LocalSystem(
            app=app,
            home=home,
            data=data,
            environment={**defaults, **without_options(environ), **system, "DOVECOTE_HOME": str(home.path)},
            servers=servers,
            processes=processes,
            ports=ports,
        )


def _procfile(app: Dovecote, chosen: Path | None) -> str:
    """Return the text of the Procfile that is asked for, or the application's, or the directory's, or the packaged one.

    Errors: SettingsError for one in this directory that others may write: it names the programs that run.
    """
    if given := chosen or app.procfile:
        return given.read_text()
    try:
        found = read_ours(Path.cwd() / "Procfile")
    except NotOurs as error:
        raise SettingsError(f"./Procfile is not read, because {error}.") from None
    return _PACKAGED_PROCFILE.read_text() if found is None else found


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
