"""The wheel, as a stranger gets it: `dovecote` and nothing else, beside a `domain` and `workers` of their own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from dovecote.local.supervisor import parse_procfile
from dovecote.migrations.revisions import revisions

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What `import dovecote` may load beside the standard library; SQLAlchemy needs the other two.
LOADED_BY_A_WRITER = {"dovecote", "sqlalchemy", "greenlet", "typing_extensions"}

IMPORT_EACH = """
import importlib, sys, threading
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert threading.active_count() == 1, "importing started something"
files = {name.partition(".")[0] for name in set(sys.modules) - before if getattr(sys.modules[name], "__file__", None)}
print(*(name for name in files if name not in sys.stdlib_module_names and not name.startswith("_")))
"""

IMPORT_ALL = """
import importlib, pkgutil
import dovecote
for module in pkgutil.walk_packages(dovecote.__path__, "dovecote."):
    if not module.name.endswith("__main__") and ".versions." not in module.name and not module.name.endswith(".env"):
        importlib.import_module(module.name)
        print(module.name)
"""

EMIT = """
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from sqlalchemy import create_engine
from sqlalchemy.orm import sessionmaker
from dovecote import Event, unit_of_work

@dataclass(frozen=True, kw_only=True)
class ParcelSent(Event, type="post.parcel_sent.v1", aggregate="parcel", key="parcel_id"):
    parcel_id: str

engine = create_engine(os.environ["DATABASE_URL"])
with unit_of_work(sessionmaker(engine)) as uow:
    uow.emit(ParcelSent(parcel_id="p-1", occurred_at=datetime.now(UTC)))
"""

EMIT_WHAT_IS_SENSITIVE = """
from dataclasses import dataclass
from datetime import UTC, datetime
from sqlalchemy.orm import Session
from dovecote import Event, Keyring, UnitOfWork, sensitive
from dovecote.errors import MissingPackage

@dataclass(frozen=True, kw_only=True)
class ParcelSent(Event, type="post.parcel_sent.v1", aggregate="parcel", key="parcel_id"):
    parcel_id: str
    recipient: str = sensitive()

keys = Keyring(hash_key=b"1" * 32, encryption_keys={"k1": b"2" * 32}, current="k1", code_key=b"3" * 32)
try:
    UnitOfWork(Session(), keys=keys).emit(ParcelSent(parcel_id="p-1", recipient="Ada", occurred_at=datetime.now(UTC)))
except MissingPackage as error:
    print(error)
"""

APPLICATION = """
from pathlib import Path
from dovecote import Dovecote
app = Dovecote(routes=(), migrations=Path(__file__).parent / "shop_migrations")
"""

REVISION = f"""
from alembic import op
revision = "shop_0001"
down_revision = None
depends_on = "{revisions(locations=())[-1]}"
branch_labels = ("application",)

def upgrade() -> None:
    op.execute("create table public.shop_parcels (id text primary key)")

def downgrade() -> None:
    op.execute("drop table public.shop_parcels")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(place), str(ROOT))
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def stranger(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that has the wheel without extras, and does not know of this checkout."""
    python = environment(tmp_path_factory.mktemp("stranger"))
    pip(python, str(wheel))
    return python


@pytest.fixture(scope="module")
def neighbour(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with every extra, and a `domain` and `workers` that nobody may import."""
    python = environment(tmp_path_factory.mktemp("neighbour"))
    place = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in ("domain", "workers", "migrations"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text(
            f"raise AssertionError('dovecote imported the {name} of somebody else')"
        )
    # The extras of this environment, but not its Dovecote: the .pth file that names the checkout is not read here.
    (place / "extras.pth").write_text(sysconfig.get_path("purelib"))
    pip(python, "--no-deps", str(wheel))
    return python


def environment(place: Path) -> str:
    run(sys.executable, "-m", "venv", "--without-pip", str(place))
    return str(place / "bin" / "python")


def pip(python: str, *words: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-compile")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *words)


def run(*command: str, variables: Mapping[str, str] | None = None) -> str:
    # Not in the checkout: there `import dovecote` would find the source. Nor as the tests' own application.
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("PYTHON", "DOVECOTE_"))}
    done = subprocess.run(
        command,
        cwd="/",
        env={**environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: Path) -> set[str]:
    found = (path.relative_to(ROOT) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    described = {name for name in names if name.startswith("dovecote-")}
    assert names - described == files_of(ROOT / "dovecote")
    assert {Path(name).suffix for name in names - described} >= {".py", ".lua", ".typed"}
    assert "LICENSE" in {Path(name).name for name in described}


def test_an_index_takes_the_wheel_and_its_contents_are_in_order(wheel: Path) -> None:
    tools = Path(sys.executable).parent

    assert "PASSED" in run(str(tools / "twine"), "check", "--strict", str(wheel))
    rules = ("--config", str(ROOT / "pyproject.toml"))
    assert ": OK" in run(str(tools / "check-wheel-contents"), *rules, str(wheel))


def test_what_a_writer_imports_loads_sqlalchemy_and_the_standard_library_only(stranger: str) -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    (base,) = (one["source_modules"] for one in contracts if one["name"].startswith("what a writer imports"))

    loaded = run(stranger, "-c", IMPORT_EACH, "dovecote", *base)

    assert set(loaded.split()) == LOADED_BY_A_WRITER


def test_the_wheel_alone_brings_the_database_packages_only(stranger: str) -> None:
    listed = run(sys.executable, "-m", "pip", "--python", stranger, "list", "--format", "freeze")

    names = {re.split(r"==| @ ", line)[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert names == {"dovecote", "sqlalchemy", "greenlet", "typing-extensions", "psycopg", "psycopg-binary"}


def test_an_event_is_emitted_with_the_wheel_alone(stranger: str, fresh_database_url: str) -> None:
    run(stranger, "-c", EMIT, variables={"DATABASE_URL": fresh_database_url})

    with psycopg.connect(fresh_database_url) as connection:
        rows = connection.execute("select event_type, aggregate_id from dovecote.outbox").fetchall()
    assert rows == [("post.parcel_sent.v1", "p-1")]


def test_a_missing_extra_is_named(stranger: str) -> None:
    assert "pip install 'dovecote[privacy]'" in run(stranger, "-c", EMIT_WHAT_IS_SENSITIVE)


def test_the_library_imports_no_domain_and_no_workers_of_somebody_else(neighbour: str) -> None:
    imported = run(neighbour, "-c", IMPORT_ALL).split()

    assert {"dovecote.bootstrap", "dovecote.cli", "dovecote.relay.relay", "dovecote.local.system"} <= set(imported)


def test_the_command_of_the_wheel_works_beside_them(neighbour: str) -> None:
    command = str(Path(neighbour).with_name("dovecote"))

    shown = run(command, "--help", variables={"COLUMNS": "200"})

    assert {"up", "relay", "status", "migrate"} <= set(re.findall(r"^│ (\w+) ", shown, re.MULTILINE))
    assert PYPROJECT["project"]["version"] in run(command, "--version")


def test_the_wheel_migrates_an_application_that_is_not_beside_it(
    neighbour: str, empty_database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(APPLICATION)
    versions = tmp_path / "shop_migrations" / "versions"
    versions.mkdir(parents=True)
    (versions / "0001_parcels.py").write_text(REVISION)
    command = str(Path(neighbour).with_name("dovecote"))
    variables = {"PYTHONPATH": str(tmp_path), "DATABASE_URL": empty_database_url}

    run(command, "migrate", variables=variables)
    run(command, "migrate", variables={**variables, "DOVECOTE_APP": "shop:app"})

    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("select count(*) from public.shop_parcels").fetchone() == (0,)


# The containers ----------------------------------------------------------------------------------


def in_compose_file() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    return services


def test_the_compose_file_runs_what_the_procfile_runs() -> None:
    services = in_compose_file()
    procfile = parse_procfile((ROOT / "Procfile").read_text(encoding="utf-8"))

    assert {name: services[name]["command"].split() for name in procfile} == procfile
    assert "dovecote migrate;" in services["migrate"]["command"]
    redis = (ROOT / "containers" / "redis.conf").read_text(encoding="utf-8").splitlines()
    assert {"appendonly yes", "maxmemory-policy noeviction"} <= set(redis)


def test_the_compose_file_migrates_before_anything_runs() -> None:
    services = in_compose_file()

    for name in parse_procfile((ROOT / "Procfile").read_text(encoding="utf-8")):
        assert services[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        assert services[name]["depends_on"]["redis"] == {"condition": "service_healthy"}
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_docker_compose_accepts_the_file_alone_and_with_servers_of_one_s_own(tmp_path: Path) -> None:
    both = ("docker-compose.yml", "docker-compose.managed.yml")
    for name in both:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")

    for files in (both[:1], both):
        run("docker-compose", *(word for name in files for word in ("-f", str(tmp_path / name))), "config", "-q")
