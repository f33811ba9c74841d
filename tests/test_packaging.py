"""The wheel, as a stranger gets it: alone it is `domain`, which needs the database packages and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from dovecote.local.supervisor import parse_procfile

ROOT = Path(__file__).parents[1]

IMPORT_ALL_OF_DOMAIN = """
import importlib, pkgutil, threading
import domain
names = [module.name for module in pkgutil.walk_packages(domain.__path__, "domain.")]
for name in names:
    importlib.import_module(name)
assert threading.active_count() == 1, "importing started something"
print(*names)
"""

EMIT = """
import os
from datetime import UTC, datetime
from domain import billing
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
with unit_of_work(sessions_for(connect(os.environ["DATABASE_URL"]))) as uow:
    print(billing.start_membership(uow, "user-1", billing.Tier.FREE, datetime.now(UTC)).id)
"""

ASK_FOR_A_PACKAGE_THAT_IS_MISSING = """
from dovecote.errors import MissingPackage
from dovecote import Keyring
key = bytes(32)
try:
    Keyring(hash_key=key, encryption_keys={"k1": key}, current="k1", code_key=key).encrypt("text", "here")
except MissingPackage as error:
    print(error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(place), str(ROOT))
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def stranger(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment that has the wheel without extras, and was never told of this checkout."""
    place = tmp_path_factory.mktemp("stranger")
    run(sys.executable, "-m", "venv", str(place))
    python = str(place / "bin" / "python")
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", str(wheel))
    return python


def run(*command: str, variables: Mapping[str, str] | None = None) -> str:
    # Not in the checkout: there `import domain` would find the source.
    done = subprocess.run(
        command,
        cwd="/",
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_code_migrations_scripts_and_procfile_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()

    for folder, pattern in (("migrations/sql", "*.sql"), ("migrations/versions", "*.py"), ("workers/lua", "*.lua")):
        here = sorted(path.name for path in (ROOT / folder).glob(pattern))
        inside = f"workers/{folder.removeprefix('workers/')}/"
        assert here
        assert sorted(name.removeprefix(inside) for name in names if name.startswith(inside)) == here
    assert {"workers/Procfile", "workers/migrations/env.py", "dovecote/py.typed", "workers/py.typed"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"domain", "workers", "dovecote"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_every_module_of_domain_is_imported_without_the_extras(stranger: str) -> None:
    imported = run(stranger, "-c", IMPORT_ALL_OF_DOMAIN).split()

    here = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "domain").rglob("*.py")]
    expected = {".".join(path.parts).removesuffix(".__init__") for path in here} - {"domain"}
    assert set(imported) == expected


def test_the_wheel_alone_brings_the_database_packages_only(stranger: str) -> None:
    listed = run(stranger, "-m", "pip", "--disable-pip-version-check", "list", "--format", "freeze")

    names = {re.split(r"==| @ ", line)[0].lower().replace("_", "-") for line in listed.splitlines()}
    tools = {"pip", "setuptools", "wheel"}
    assert names - tools == {
        "dovecote",
        "sqlalchemy",
        "greenlet",
        "typing-extensions",
        "psycopg",
        "psycopg-binary",
    }


def test_an_event_is_emitted_with_the_wheel_alone(stranger: str, fresh_database_url: str) -> None:
    membership_id = run(stranger, "-c", EMIT, variables={"DATABASE_URL": fresh_database_url}).strip()

    with psycopg.connect(fresh_database_url) as connection:
        rows = connection.execute("select event_type, aggregate_id from dovecote.outbox").fetchall()
    assert rows == [("billing.membership_started.v1", membership_id)]


def test_a_missing_extra_is_named(stranger: str) -> None:
    assert "pip install 'dovecote[privacy]'" in run(stranger, "-c", ASK_FOR_A_PACKAGE_THAT_IS_MISSING)


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
