"""Attack: modules with well-known names, and a `.env`, in a directory where somebody starts us with all our keys."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dovecote.local.supervisor import parse_procfile
from tests.support.keys import KEYS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

# What a process of ours imports, whenever it does; a submodule comes from its package. Then what Python and Dramatiq
# import before anything of ours, where somebody has them look into that directory first.
OURS = "dovecote.cli, dovecote.bootstrap, dovecote.exporter.server, workers.demo, dramatiq.cli, multiprocessing.spawn"
BEFORE_US = "runpy, dramatiq.cli, multiprocessing.spawn"
IMPORTED = """
import sys, {}
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
SPOILED = """
import os
with open({marker!r}, "a") as file:
    file.write(__name__ + chr(10))
os._exit(66)
"""
DRAMATIQ = "dramatiq dovecote.bootstrap:consumers --queues pricing --processes 1 --threads 1"
NOWHERE = {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1/0"}
STARTED = ("Consumer encountered a connection error", "postgres is away", "waiting for", "BATCH_SIZE", "(head)")


def imported_by(modules: str) -> set[str]:
    command = [sys.executable, "-c", IMPORTED.format(modules)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {*printed.split()} - {"__main__", "__mp_main__", "dovecote"}


def spoiled(place: Path, names: set[str]) -> Path:
    """Fill a directory: whatever is imported from it writes its name into `marker`."""
    for name in names:
        (place / f"{name}.py").write_text(SPOILED.format(marker=str(place / "marker")))
    (place / "dovecote").mkdir()  # a namespace package, which must not hide ours
    return place


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every name."""
    names = {*imported_by(OURS), "sitecustomize", "usercustomize", "benchmarks", "migrations"}
    assert {"orjson", "redis", "json", "domain", "psycopg", "dramatiq"} <= names
    return spoiled(tmp_path_factory.mktemp("hostile"), names)


@pytest.fixture(scope="module")
def hostile_to_us(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the names of all packages that our own modules import, and that are not imported before."""
    # Dramatiq looks there first for Python's own as well, before it comes to us: only `--path` keeps it from that.
    names = imported_by(OURS) - imported_by(BEFORE_US) - sys.stdlib_module_names
    assert {"orjson", "redis", "domain", "psycopg", "structlog"} <= names
    return spoiled(tmp_path_factory.mktemp("hostile_to_us"), names)


def started_in(directory: Path, command: str, home: Path, **variables: str) -> str:
    """Run a command there until it says one of `STARTED`, as foreman and others do; return what it has said."""
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.defpath}",
        "DOVECOTE_APP": "workers.app:app",
        "PYTHONPATH": str(ROOT),
        "DOVECOTE_HOME": str(home),
    }
    process = subprocess.Popen(
        shlex.split(command),
        cwd=directory,
        env={**environment, **NOWHERE, **KEYS, "DOVECOTE_TELEMETRY__LOG_LEVEL": "debug", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if any(word in line for word in STARTED):
            break
    process.terminate()
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()
    return said


def assert_starts(directory: Path, command: str, home: Path) -> None:
    said = started_in(directory, command, home)

    marker = directory / "marker"
    imported = marker.read_text() if marker.exists() else ""
    marker.unlink(missing_ok=True)
    assert imported == "", said
    assert any(word in said for word in STARTED), said


WAYS = {
    **{name: shlex.join(words) for name, words in parse_procfile((ROOT / "Procfile").read_text()).items()},
    "dovecote": "dovecote settings",
    "what ./dev becomes": "python -P -m dovecote settings",
    "alembic": f"alembic -c {ROOT}/alembic.ini heads",
}
del WAYS["relay-2"], WAYS["billing"], WAYS["verification"]  # as their neighbours


@pytest.mark.parametrize("command", WAYS.values(), ids=WAYS)
def test_no_way_to_start_imports_from_the_directory_where_it_is_done(
    hostile: Path, tmp_path: Path, command: str
) -> None:
    assert_starts(hostile, command, tmp_path)


BY_HAND = {
    "dramatiq": DRAMATIQ,
    "dramatiq that spawns": f"{DRAMATIQ} --use-spawn",
    "dramatiq as a module": f"python -m {DRAMATIQ}",
    "python -m dovecote": "python -m dovecote settings",
}


@pytest.mark.parametrize("command", BY_HAND.values(), ids=BY_HAND)
def test_ours_are_not_imported_from_there_although_python_searches_there_first(
    hostile_to_us: Path, tmp_path: Path, command: str
) -> None:
    assert_starts(hostile_to_us, command, tmp_path)


def test_dev_asks_a_python_what_it_can_without_looking_there(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dev = runpy.run_path(str(ROOT / "dev"))
    monkeypatch.chdir(hostile)

    assert dev["answer"](sys.executable, "import pip, json; print(7)") == "7"
    assert not (hostile / "marker").exists()
