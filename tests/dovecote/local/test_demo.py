"""The built-in demo: `dovecote up` in an empty directory, with no application named."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dovecote.local.system import _procfile
from dovecote.route import Dovecote
from dovecote.settings import SettingsError
from tests.support import commands
from tests.support.processes import a_place_for_servers, eventually

ROOT = Path(__file__).parents[3]


def environment(home: Path) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("PATH", "DOVECOTE_POSTGRES_BIN", "DOVECOTE_REDIS_BIN") if name in os.environ
    }
    return {**kept, "PYTHONPATH": str(ROOT), "DOVECOTE_HOME": str(home)}


def dovecote(home: Path, directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return commands.run_text([*words], environment(home), directory)


@contextmanager
def running(home: Path, directory: Path) -> Iterator[Path]:
    """Run `dovecote up` until the end of the block; yield the file with its output."""
    log = home / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dovecote", "up"],
            cwd=directory,
            env=environment(home),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield log
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def home() -> Iterator[Path]:
    with a_place_for_servers() as place:
        yield place


def test_an_empty_directory_runs_the_demo_and_every_command_beside_it_finds_it(home: Path, tmp_path: Path) -> None:
    with running(home, tmp_path) as log:
        eventually(lambda: "relay leads" in log.read_text(), 60, "a leading relay")
        demo = dovecote(home, tmp_path, "demo", "--events", "50", "--json")
        status = dovecote(home, tmp_path, "status", "--json")

    assert "DOVECOTE_APP names no application: this runs the built-in demo\n" in log.read_text()
    assert (demo.returncode, demo.stderr) == (0, "")
    report: dict[str, Any] = json.loads(demo.stdout)
    assert [report[key] for key in ("written", "processed", "lost", "duplicated")] == [50, 50, 0, 0]
    assert list(json.loads(status.stdout)["handlers"]) == ["demo.receive"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["relay"], ["status"], ["doctor"]], ids=" ".join)
def test_no_other_command_takes_the_demo_for_the_application(tmp_path: Path, words: list[str]) -> None:
    nowhere = {"DATABASE_URL": "postgresql://x@127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1/0"}

    done = commands.run_text(words, {**environment(tmp_path), **nowhere}, tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dovecote: DOVECOTE_APP is missing: ")


def test_dramatiq_does_not_take_the_demo_for_the_application(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", "from dovecote.bootstrap import consumers; consumers()"]

    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert "DOVECOTE_APP is missing: " in done.stderr


def test_the_procfile_is_the_chosen_one_or_the_application_s_or_the_directory_s_or_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").write_text("own: true\n")
    bare, whole = Dovecote(routes=()), Dovecote(routes=(), procfile=tmp_path / "own")
    assert "dovecote relay" in _procfile(bare, None)

    (tmp_path / "Procfile").write_text("here: true\n")
    assert _procfile(bare, None) == "here: true\n"
    assert _procfile(whole, None) == "own: true\n"
    (tmp_path / "chosen").write_text("chosen: true\n")
    assert _procfile(whole, tmp_path / "chosen") == "chosen: true\n"

    (tmp_path / "Procfile").chmod(0o666)
    with pytest.raises(SettingsError, match=r"\./Procfile is not read, because everybody may write to "):
        _procfile(bare, None)
