"""What a contributor meets first: its commands exist, its versions are the project's, its lock files fit."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from hashlib import sha256
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from dovecote.cli import app

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "CHANGELOG.md")]
PYTHONS = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def yaml_of(name: str) -> Any:
    return yaml.safe_load(text_of(name))


@pytest.fixture(scope="module")
def dev() -> ModuleType:
    """The file `dev` as a module, for the environment that runs the tests."""
    os.environ["DOVECOTE_VENV"], before = sys.prefix, os.environ.get("DOVECOTE_VENV")
    try:
        loader = SourceFileLoader("dev_of_the_checkout", str(ROOT / "dev"))
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
    finally:
        os.environ.pop("DOVECOTE_VENV")
        if before is not None:
            os.environ["DOVECOTE_VENV"] = before
    return module


# Commands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*WORKFLOWS, *PAGES, ROOT / ".devcontainer" / "devcontainer.json"], ids=lambda path: path.name
)
def test_every_word_of_dev_that_is_named_exists(path: Path, dev: ModuleType) -> None:
    text = path.read_text(encoding="utf-8")
    ours = set(re.findall(r"\./dev ([a-z]+)", dev.HELP))
    of_dovecote = set(re.findall(r"\./dev ([a-z]+)", text)) - ours

    assert [word for word in of_dovecote if CliRunner().invoke(app, [word, "--help"]).exit_code != 0] == []
    assert set(re.findall(r"\./dev test (--[a-z]+)", text)) <= set(re.findall(r"\./dev test (--[a-z]+)", dev.HELP))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_script_of_a_workflow_exists_and_every_action_is_pinned(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]

    scripts = {step["run"].split()[0] for step in steps if step.get("run", "").startswith((".", "containers/"))}
    assert scripts >= {"./dev"}
    assert [script for script in scripts if not os.access(ROOT / script, os.X_OK)] == []
    for action in (step["uses"] for step in steps if "uses" in step):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)


def test_a_page_links_to_files_that_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


# Versions ----------------------------------------------------------------------------------------


def test_ci_runs_every_python_that_the_project_names(dev: ModuleType) -> None:
    jobs = yaml_of(".github/workflows/ci.yml")["jobs"]

    assert jobs["python"]["strategy"]["matrix"]["python"] == PYTHONS == list(dev.LOCKED_PYTHONS)
    assert all(Version(version) in Requirement(f"python{PROJECT['requires-python']}").specifier for version in PYTHONS)


def test_ci_runs_every_postgres_and_both_redis_and_valkey() -> None:
    servers = yaml_of(".github/workflows/ci.yml")["jobs"]["servers"]
    pairs = servers["strategy"]["matrix"]["include"]

    assert [pair["postgres"] for pair in pairs] == [f"postgres:{version}" for version in (15, 16, 17, 18)]
    assert {"redis:7", "redis:8"} <= {pair["redis"] for pair in pairs}
    assert any(pair["redis"].startswith("valkey/valkey:") for pair in pairs)
    assert set(servers["env"]) <= set(re.findall(r"DOVECOTE_TEST_\w+", text_of("tests/conftest.py")))


def test_the_hooks_check_with_the_ruff_of_the_lock_file() -> None:
    repos = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in yaml_of(".pre-commit-config.yaml")["repos"]}

    assert Version(repos["ruff-pre-commit"]) == locked("dev.txt")["ruff"]


def test_the_dev_container_has_the_servers_of_the_compose_file() -> None:
    container = json.loads(re.sub(r"^\s*//.*$", "", text_of(".devcontainer/devcontainer.json"), flags=re.MULTILINE))
    services = yaml_of(f".devcontainer/{container['dockerComposeFile']}")["services"]
    ours = yaml_of("docker-compose.yml")["services"]

    assert container["service"] in services
    assert {name: services[name]["image"] for name in ("postgres", "redis")} == {
        name: ours[name]["image"] for name in ("postgres", "redis")
    }


def test_the_change_log_begins_with_the_version_that_is_next_or_out() -> None:
    newest = re.search(r"^## (\S+)", text_of("CHANGELOG.md"), re.MULTILINE)

    assert newest is not None
    assert newest[1] in {PROJECT["version"], "Unreleased"}


# Lock files --------------------------------------------------------------------------------------


def locked(name: str) -> dict[str, Version]:
    """Every package of a lock file that this Python would install."""
    lines = re.findall(r"^([a-z0-9][^\\\n]*?) \\$", text_of(f"requirements/{name}"), re.MULTILINE)
    requirements = [Requirement(line) for line in lines]
    here = [one for one in requirements if one.marker is None or one.marker.evaluate()]
    return {one.name: Version(str(one.specifier).removeprefix("==")) for one in here}


def wanted_by(extras: list[str]) -> list[Requirement]:
    found, todo = [Requirement(line) for line in PROJECT["dependencies"]], list(extras)
    while todo:
        for one in map(Requirement, PROJECT["optional-dependencies"][todo.pop()]):
            if one.name == PROJECT["name"]:
                todo += one.extras
            else:
                found.append(one)
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("name", "extra"), [("dev.txt", "dev"), ("workers.txt", "workers")])
def test_a_lock_file_has_a_fitting_version_of_all_that_pyproject_asks_for(name: str, extra: str) -> None:
    versions = locked(name)

    unfit = [
        str(one) for one in wanted_by([extra]) if versions.get(canonical(one.name), Version("0")) not in one.specifier
    ]
    assert unfit == [], "run ./dev lock"


def test_the_lock_files_agree() -> None:
    everything = locked("dev.txt")

    for name in ("workers.txt", "build.txt"):
        assert locked(name).items() <= everything.items(), name


def test_what_builds_the_wheel_is_locked_too() -> None:
    lines = [line for line in text_of("requirements/build.in").splitlines() if not line.startswith("#")]

    assert set(PYPROJECT["build-system"]["requires"]) <= set(lines)
    assert {canonical(Requirement(line).name) for line in lines} <= set(locked("build.txt"))


@pytest.mark.parametrize("name", ["dev.txt", "workers.txt", "build.txt"])
def test_a_lock_file_has_hashes_and_names_no_place(name: str) -> None:
    text = text_of(f"requirements/{name}")
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]

    assert entries
    assert [entry.split()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert not re.search(r"://|--index|--find-links|--trusted-host", text)


# Installing --------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all that pip may install from, and from which it installs beside this environment."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    return tmp_path


def a_wheel(index: Path, tags: str) -> str:
    """Make a wheel of `pigeon` 1.0; return its hash."""
    wheel = index / f"pigeon-1.0-{tags}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        described = "pigeon-1.0.dist-info"
        archive.writestr("pigeon.py", "")
        archive.writestr(f"{described}/METADATA", "Metadata-Version: 2.1\nName: pigeon\nVersion: 1.0\n")
        archive.writestr(f"{described}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n")
        archive.writestr(f"{described}/RECORD", "")
    return sha256(wheel.read_bytes()).hexdigest()


def install(dev: ModuleType, index: Path, digest: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    lock = index / "dev.txt"
    lock.write_text(f"pigeon==1.0 --hash=sha256:{digest}\n")
    monkeypatch.setattr(dev, "LOCKED", lock)
    installed: bool = dev.install_locked()
    return installed


def test_setup_installs_what_is_locked(dev: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert install(dev, index, a_wheel(index, "py3-none-any"), monkeypatch)

    assert (index / "installed" / "pigeon.py").exists()


def test_setup_says_which_version_has_no_wheel_for_this_machine(
    dev: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not install(dev, index, a_wheel(index, "py3-none-win_arm64"), monkeypatch)

    assert "no wheel of pigeon==1.0 for this machine" in capfd.readouterr().err


def test_setup_installs_nothing_that_has_another_hash(
    dev: ModuleType, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_wheel(index, "py3-none-any")

    with pytest.raises(dev.Trouble):
        install(dev, index, "0" * 64, monkeypatch)
    assert not (index / "installed").exists()


def test_setup_is_done_again_when_a_locked_version_changes(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dev.fingerprint()

    monkeypatch.setattr(dev, "LOCKED", tmp_path / "dev.txt")
    dev.LOCKED.write_text("pigeon==1.0\n")

    assert dev.fingerprint() != before


def test_dev_is_read_by_an_older_python() -> None:
    subprocess.run(
        [sys.executable, "-c", "import ast,sys; ast.parse(sys.stdin.read(), feature_version=(3, 9))"],
        input=text_of("dev"),
        text=True,
        check=True,
    )
