"""A container that is taken over: it finds one login, the secrets of its own work, and no way on.

What docker-compose.yml and the Dockerfile say. That it also works is seen by tests/containers/run.
"""

import os
import pwd
import re
import stat
import subprocess
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
import yaml

from dovecote.cli.options import default_actor

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
MANAGED: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.managed.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
KEYS = {"hash_key", "encryption_keys", "code_key"}
ROLE_OF = {
    "database_url_relay": "dovecote_worker",
    "database_url_consumers": "dovecote_worker",
    "database_url_cli": "dovecote_operator",
    "database_url_look": "dovecote_viewer",
}

every_service = pytest.mark.parametrize("name", SERVICES)


@every_service
def test_a_service_gets_a_read_only_root_no_capability_and_limits(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert not {"cap_add", "privileged", "devices", "pid", "ipc", "network_mode"} & set(service)
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert service["cpus"] > 0
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])
    assert not [mount for mount in service.get("volumes", []) if mount.startswith("/") or "docker.sock" in mount]


@every_service
def test_a_service_that_stays_is_watched_and_started_again(name: str) -> None:
    service = SERVICES[name]

    if service["restart"] == "no":
        assert name in {"migrate", "cli", "look"}
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"]


@every_service
def test_no_secret_is_in_an_environment_or_on_a_command_line(name: str) -> None:
    service = SERVICES[name]
    words = f"{service.get('command', '')} {service.get('entrypoint', '')}"

    assert not re.search(r"pass|--requirepass|://|\$\{", words)
    for variable, value in service.get("environment", {}).items():
        if re.search(r"PASSWORD|_KEYS?(_|$)|_URL|SECRET|TOKEN", variable):
            assert variable.endswith("_FILE"), variable
            assert value.removeprefix("/run/secrets/") in service["secrets"]
        assert "://" not in str(value)
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == {
        f"./containers/secrets/{name}" for name in COMPOSE["secrets"]
    }


def test_the_compose_files_read_no_secret_from_variables() -> None:
    for name in ("docker-compose.yml", "docker-compose.managed.yml"):
        assert "${" not in (ROOT / name).read_text(encoding="utf-8")


def test_keys_are_in_verification_and_nowhere_else() -> None:
    holders = {name for name, service in SERVICES.items() if KEYS & set(service.get("secrets", []))}

    assert holders == {"verification"}
    assert set(SERVICES["verification"]["secrets"]) >= KEYS


def test_the_owner_s_login_is_with_migrate_alone() -> None:
    holders = {name for name, service in SERVICES.items() if "database_url_owner" in service.get("secrets", [])}

    assert holders == {"migrate"}
    passwords = {name for name, service in SERVICES.items() if "postgres_password" in service.get("secrets", [])}
    assert passwords == {"postgres"}


def test_a_process_has_one_login_of_each_server() -> None:
    found = {
        name: sorted(one for one in service["secrets"] if "_url_" in one)
        for name, service in SERVICES.items()
        if service.get("image") == "dovecote" and name != "migrate"
    }

    relay, consumers = ["database_url_relay", "redis_url_worker"], ["database_url_consumers", "redis_url_worker"]
    assert found == {
        "relay": relay,
        "relay-2": relay,
        "pricing": consumers,
        "billing": consumers,
        "verification": consumers,
        "cli": ["database_url_cli", "redis_url_look"],
        "look": ["database_url_look", "redis_url_look"],
    }


def test_each_login_that_migrate_makes_has_one_role() -> None:
    text = (ROOT / "containers" / "logins.py").read_text(encoding="utf-8")

    assert dict(re.findall(r'Login\("(\w+)", "(\w+)"', text)) == ROLE_OF
    assert set(ROLE_OF) | {"database_url_owner"} == set(SERVICES["migrate"]["secrets"])


def test_monitoring_and_data_share_no_network() -> None:
    networks = {name: set(service["networks"]) for name, service in SERVICES.items()}

    assert networks["postgres"] == networks["redis"] == {"data"}
    assert networks["prometheus"] == {"metrics", "panels"}
    assert networks["grafana"] == {"panels", "browsers"}
    open_ones = {name for name, network in COMPOSE["networks"].items() if network != {"internal": True}}
    assert open_ones == {"browsers"}


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert ports == ["127.0.0.1:3000:3000"]


@pytest.mark.parametrize("name", ["relay", "relay-2", "pricing", "billing", "verification"])
def test_a_process_can_be_started_many_times(name: str) -> None:
    assert not {"container_name", "ports", "hostname"} & set(SERVICES[name])


def test_images_are_pinned_to_a_release() -> None:
    images = [service["image"] for service in SERVICES.values() if service["image"] != "dovecote"]
    images += re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)

    assert len(images) == 6
    pinned = re.compile(r":v?\d+\.\d+(\.\d+)?(-[\w.-]+)?(@sha256:\w{64})?$")
    assert [image for image in images if not pinned.search(image)] == []


def test_the_tests_of_the_suite_and_compose_name_the_same_images() -> None:
    conftest = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")

    assert f'"{SERVICES["postgres"]["image"]}"' in conftest
    assert f'"{SERVICES["redis"]["image"]}"' in conftest


def test_the_image_runs_as_nobody_and_imports_nothing_from_where_it_starts() -> None:
    last = (ROOT / "Dockerfile").read_text(encoding="utf-8").rpartition("\nFROM ")[2]

    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE)
    assert "PYTHONSAFEPATH=1" in last
    assert "pip" not in last
    assert "apt" not in last


def test_an_operator_has_a_name_where_the_container_s_user_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)

    assert default_actor().startswith(f"uid {os.getuid()}@")


def test_only_what_the_image_is_made_of_is_sent_to_be_built() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()

    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    assert not [rule for rule in rules if re.fullmatch(r"!(containers|\.env.*|containers/secrets.*|\*.*)", rule)]


def test_health_is_asked_of_live_and_options_come_from_env() -> None:
    for name in ("relay", "relay-2", "pricing", "billing", "verification"):
        assert "/health/live" in " ".join(SERVICES[name]["healthcheck"]["test"])
        assert SERVICES[name]["env_file"] == ".env"


def test_servers_of_one_s_own_take_the_place_of_both() -> None:
    ours = {name for name, service in SERVICES.items() if service.get("image") == "dovecote"}

    assert set(MANAGED["services"]) == ours
    for service in MANAGED["services"].values():
        assert service["environment"] == {"DATABASE_URL_FILE": "", "REDIS_URL_FILE": ""}
        assert service["networks"] == ["outside"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "containers").mkdir()
    script = tmp_path / "containers" / "make-secrets"
    script.write_bytes((ROOT / "containers" / "make-secrets").read_bytes())
    script.chmod(0o755)
    return tmp_path


def make_secrets(project: Path) -> tuple[dict[str, str], str]:
    done = subprocess.run(
        [str(project / "containers" / "make-secrets")], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr
    return {path.name: path.read_text() for path in (project / "containers" / "secrets").iterdir()}, done.stderr


def test_make_secrets_makes_each_secret_once_and_shows_none(project: Path) -> None:
    first, said = make_secrets(project)
    second, _ = make_secrets(project)

    assert set(first) == set(COMPOSE["secrets"])
    assert first == second
    passwords = [str(urlsplit(text).password) for name, text in first.items() if "_url_" in name]
    assert len(set(passwords)) == len(passwords) == 7
    assert min(map(len, passwords)) >= 32
    assert not [value for value in [*passwords, *(first[key] for key in KEYS)] if value in said]
    place = project / "containers" / "secrets"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o444}


def test_redis_gets_digests_and_its_default_user_is_off(project: Path) -> None:
    made, _ = make_secrets(project)

    lines = made["redis_acl"].splitlines()
    assert lines[0].startswith("user default off resetpass ")
    assert len(lines) == 4
    for line in lines[1:]:
        assert re.search(r" on #[0-9a-f]{64} resetchannels ", line)
        assert "nopass" not in line
        assert "-@all" in line
        assert "~*" not in line
    for name in ("redis_url_worker", "redis_url_look", "redis_health"):
        assert (urlsplit(made[name]).password or made[name]) not in made["redis_acl"]


def test_make_secrets_takes_over_what_an_older_env_holds_and_asks_to_remove_it(project: Path) -> None:
    (project / ".env").write_text(
        "POSTGRES_PASSWORD=old1\nDOVECOTE_PRIVACY__CODE_KEY='old2='\n#DOVECOTE_PRIVACY__HASH_KEY=not\n"
        "DOVECOTE_REDIS__NAMESPACE=shop\n"
    )

    made, said = make_secrets(project)

    assert made["postgres_password"] == "old1"
    assert urlsplit(made["database_url_owner"]).password == "old1"
    assert made["code_key"] == "old2="
    assert "not" not in made["hash_key"]
    assert "~shop:*" in made["redis_acl"]
    assert "take POSTGRES_PASSWORD out of .env" in said
    assert "old1" not in said
