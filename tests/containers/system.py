"""docker-compose.yml brought up and looked at from inside and outside; each check is a sentence that holds or not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.containers.engine import ROOT, Engine, say, wait_for

_FILES = ("docker-compose.yml", "docker-compose.managed.yml", "Dockerfile", "Procfile", ".dockerignore", ".env.example")
_FOLDERS = ("containers", "monitoring")
_PROCESSES = ("relay", "relay-2", "pricing", "billing", "verification")
_RUNNING = ("postgres", "redis", *_PROCESSES)
_KEYS = {"hash_key", "encryption_keys", "code_key"}
_OPTION = "DOVECOTE_RELAY__BATCH_SIZE=1234"

_SESSIONS = """
import os, pathlib, psycopg
with psycopg.connect(pathlib.Path(os.environ["DATABASE_URL_FILE"]).read_text()) as connection:
    for row in connection.execute(
        "select distinct usename, rolsuper or rolcreaterole or rolcreatedb from pg_stat_activity"
        " join pg_roles on rolname = usename where backend_type = 'client backend' and pid <> pg_backend_pid()"
    ):
        print(*row)
"""
_AS_REDIS_USER = """
import os, pathlib, sys, redis
client = redis.Redis.from_url(pathlib.Path(os.environ["REDIS_URL_FILE"]).read_text().strip())
for words in sys.argv[1:]:
    try:
        client.execute_command(*words.split())
        print("done:", words)
    except redis.exceptions.ResponseError as error:
        print("refused:", words, "|", error)
"""
_STRANGER = """
import redis
try:
    redis.Redis(host="redis").execute_command("GET", "dovecote:__relay__")
    print("let in")
except redis.exceptions.RedisError as error:
    print("refused:", error)
"""
_OPEN = 'timeout 3 bash -c "</dev/tcp/$0/$1" && echo open'
_ASK = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"


_CREATE_DATABASE = """
import os, pathlib, psycopg
url = pathlib.Path(os.environ["DATABASE_URL_FILE"]).read_text()
psycopg.connect(url, autocommit=True).execute("create database elsewhere")
"""


class Compose:
    """One project of docker-compose on our engine, in a copy of the checkout's files."""

    def __init__(self, engine: Engine, place: Path, name: str, *more_files: str) -> None:
        self.engine = engine
        self.place = place
        has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
        program = ["docker", "compose"] if has_plugin else ["docker-compose"]
        self.command = [
            *program,
            "-p",
            name,
            "-f",
            "docker-compose.yml",
            *(word for file in more_files for word in ("-f", file)),
        ]

    def __call__(self, *words: str, check: bool = True, within: float = 240) -> str:
        return self.engine.run([*self.command, *words], check=check, within=within, cwd=self.place)

    def containers(self, *services: str) -> list[str]:
        return self("ps", "-q", *services, check=False).split()

    def inside(self, service: str, *words: str, check: bool = True) -> str:
        return self.engine.docker("exec", self.containers(service)[0], *words, check=check)

    def once(self, service: str, *words: str, check: bool = True) -> str:
        """Run a command in a new container of a service, without those it depends on."""
        return self("run", "--rm", "--no-deps", "-T", service, *words, check=check)


class Minutes:
    """What was found to hold and what not."""

    def __init__(self) -> None:
        self.held = self.failed = 0

    def note(self, sentence: str, holds: bool, why: object = "") -> None:
        self.held += holds
        self.failed += not holds
        say(f"{'ok     ' if holds else 'FAILED '} {sentence}" + ("" if holds else f"\n        {str(why)[-2500:]}"))

    def run(self, sentence: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (AssertionError, subprocess.SubprocessError) as error:
            self.note(sentence, False, error)
        else:
            self.note(sentence, True)


def check(engine: Engine) -> int:
    place = engine.place / "project"
    copy_project(place)
    say("building the image")
    engine.docker("build", "--quiet", "--network=host", "-t", "dovecote", str(ROOT), within=600)
    engine.run([str(place / "containers" / "make-secrets")])
    (place / ".env").write_text((place / ".env.example").read_text() + f"\n{_OPTION}\n", encoding="utf-8")
    compose = Compose(engine, place, "dovecote")
    minutes = Minutes()
    minutes.run("docker-compose up -d: all is healthy", lambda: up(compose))
    if minutes.failed:
        say(compose("logs", "--no-color", "--tail=40", check=False)[-12_000:])
        return end(minutes)
    for part in (flow, logins, secrets, hardening, redis_users, commands, monitoring, renewal, managed, stop):
        began = time.monotonic()
        try:
            part(compose, minutes)
        except (AssertionError, subprocess.SubprocessError, IndexError, ValueError) as error:
            minutes.note(f"{part.__name__} could be looked at to its end", False, error)
        say(f"        ({part.__name__}: {time.monotonic() - began:.0f} s)")
    return end(minutes)


def end(minutes: Minutes) -> int:
    say(f"{minutes.held} passed, {minutes.failed} failed")
    return 1 if minutes.failed else 0


def copy_project(place: Path) -> None:
    place.mkdir()
    for name in _FILES:
        shutil.copy(ROOT / name, place / name)
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("secrets", "__pycache__"))


def up(compose: Compose, *words: str, services: tuple[str, ...] = _RUNNING) -> None:
    compose("up", "-d", "--no-build", *words, within=300)
    wait_for(lambda: not unhealthy(compose, services), 120, f"healthy: {unhealthy(compose, services)}")
    named = ("--filter", "name=migrate_1", "--filter", "name=migrate-1")
    (migrate,) = compose.engine.docker("ps", "-aq", *named).split()[:1]
    state = inspect(compose, [migrate])[0]["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0), state


def unhealthy(compose: Compose, services: tuple[str, ...]) -> list[str]:
    bad = []
    for service in services:
        found = compose.containers(service)
        health = [one["State"].get("Health", {}).get("Status") for one in inspect(compose, found)]
        if not found or set(health) != {"healthy"}:
            bad.append(f"{service}: {health}")
    return bad


def inspect(compose: Compose, containers: list[str]) -> list[dict]:  # type: ignore[type-arg]  # Docker's own shape
    return json.loads(compose.engine.docker("inspect", *containers)) if containers else []


def flow(compose: Compose, minutes: Minutes) -> None:
    output = compose.once("verification", "dovecote", "demo", "--events", "500", "--json", check=False)
    report = json.loads(output[output.index("{") : output.rindex("}") + 1]) if "{" in output else {}
    whole = report.get("processed") == 500 and report.get("lost") == 0 and report.get("duplicated") == 0
    minutes.note("demo: 500 written, 500 processed, 0 lost, 0 duplicated", whole, output)


def logins(compose: Compose, minutes: Minutes) -> None:
    sessions = dict(line.split() for line in compose.once("migrate", "python", "-c", _SESSIONS).splitlines() if line)
    minutes.note(
        "relays and consumers are connected as dovecote_relay and dovecote_consumers, who are no superusers",
        sessions == {"dovecote_relay": "False", "dovecote_consumers": "False"},
        sessions,
    )


def secrets(compose: Compose, minutes: Minutes) -> None:
    values = secret_values(compose.place / "containers" / "secrets")
    held = {name: set(compose.inside(name, "ls", "/run/secrets").split()) for name in _RUNNING}
    minutes.note(
        "only verification holds keys", {name for name in held if held[name] & _KEYS} == {"verification"}, held
    )
    owners = [name for name in held if "database_url_owner" in held[name]]
    minutes.note("no process that stays holds the owner's URL", not owners, owners)
    everything = compose.engine.docker("ps", "-aq").split()
    for what, text in {
        "docker inspect": compose.engine.docker("inspect", *everything),
        "the command line of any process": compose.engine.run(["ps", "-ewwo", "args"]),
        "docker-compose config": compose("config"),
        "the logs": compose("logs", "--no-color"),
        "the image's history": compose.engine.docker("history", "--no-trunc", "dovecote"),
    }.items():
        found = [name for name, value in values if value in text]
        minutes.note(f"no password and no key is in {what}", not found, found)


def secret_values(place: Path) -> list[tuple[str, str]]:
    values = []
    for path in place.iterdir():
        text = path.read_text(encoding="utf-8").strip()
        if path.name == "redis_acl":
            continue
        password = re.search(r"://[^:]+:([^@]+)@", text)
        values.append((path.name, password.group(1) if password else text.rpartition(":")[2]))
    return values


def hardening(compose: Compose, minutes: Minutes) -> None:
    for name in _RUNNING:
        status = compose.inside(name, "cat", "/proc/1/status")
        found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        uids = {int(uid) for uid in found["Uid"].split()}
        capabilities = {int(found[field], 16) for field in ("CapEff", "CapPrm", "CapBnd")}
        refusal = compose.inside(name, "sh", "-c", "echo x > /etc/x; echo x > /usr/x", check=False)
        (about,) = inspect(compose, compose.containers(name))[:1]
        host = about["HostConfig"]
        limits = host["Memory"] > 0 and host["NanoCpus"] > 0 and (host["PidsLimit"] or 0) > 0
        minutes.note(
            f"{name}: not root, no capabilities, no new privileges, a read-only root, limits",
            0 not in uids
            and capabilities == {0}
            and found["NoNewPrivs"] == "1"
            and host["ReadonlyRootfs"]
            and refusal.count("Read-only") == 2
            and limits,
            (uids, capabilities, found["NoNewPrivs"], refusal, host["Memory"], host["PidsLimit"]),
        )
    everything = inspect(compose, compose.engine.docker("ps", "-q").split())
    published = [one["HostConfig"]["PortBindings"] for one in everything]
    minutes.note("no port is published", not any(published), published)


def redis_users(compose: Compose, minutes: Minutes) -> None:
    output = compose.inside(
        "relay", "python", "-c", _AS_REDIS_USER,
        "SET dovecote:x 1", "DEL dovecote:x", "INFO memory",
        "SET other 1", "GET other", "FLUSHALL", "CONFIG GET requirepass", "ACL LIST", "SHUTDOWN", "DEBUG SLEEP 1",
        "FUNCTION LIST", "SCRIPT FLUSH", "CLIENT KILL TYPE normal", "REPLICAOF 127.0.0.1 1", "MONITOR", "MODULE LIST",
        "MIGRATE 127.0.0.1 1 dovecote:x 0 1", "SWAPDB 0 1", "SAVE",
    )  # fmt: skip
    done = re.findall(r"^done: (.*)$", output, re.MULTILINE)
    minutes.note("Redis: the worker works on its own keys and does nothing else", done == [
        "SET dovecote:x 1", "DEL dovecote:x", "INFO memory",
    ], output)  # fmt: skip
    output = compose.inside("relay", "python", "-c", _STRANGER)
    minutes.note("Redis: nobody gets in without a password", "refused" in output, output)
    output = compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "python", "look", "-c", _AS_REDIS_USER,
                   "LLEN dovecote:pricing", "SET dovecote:x 1", "DEL dovecote:pricing", "KEYS *")  # fmt: skip
    minutes.note("Redis: who looks changes nothing", re.findall(r"^done: (.*)$", output, re.MULTILINE) == [
        "LLEN dovecote:pricing"
    ], output)  # fmt: skip


def commands(compose: Compose, minutes: Minutes) -> None:
    output = compose.once("cli", "status", "--json", check=False)
    minutes.note("run cli status", '"lag' in output, output)
    for service in ("cli", "look"):
        output = compose.once(service, "doctor", "--json", check=False)
        report = json.loads(output[output.index("{") : output.rindex("}") + 1]) if "{" in output else {}
        found = report.get("findings", [])
        # Both servers' way is compose's own network, without TLS: the one thing to warn of.
        bad = {one["check"] for one in found if one["level"] != "ok"}
        minutes.note(
            f"run {service} doctor: examines both servers, the flow and all rights, and finds nothing else than no TLS",
            len(found) > 30 and bad == {"postgres.encrypted", "redis.encrypted"},
            (bad, output),
        )
    output = compose.once("look", "status", "--json", check=False)
    minutes.note("run look status", '"lag' in output, output)
    output = compose.once("look", "handlers", "pause", "pricing.apply_quotes", "--reason", "a test", check=False)
    minutes.note("look may not pause a handler", "Traceback" not in output and "denied" in output.lower(), output)
    output = compose.inside("relay", "dovecote", "settings", "--in-force")
    minutes.note("options of .env reach the containers", "1234" in output, output)
    for verb in ("pause", "resume"):
        output = compose.once("cli", "handlers", verb, "pricing.apply_quotes", "--reason", "a test", check=False)
        minutes.note(f"run cli handlers {verb}", "denied" not in output and "Traceback" not in output, output)
    planted = "cd /tmp && echo 'raise SystemExit(7)' >orjson.py && dovecote --version"
    output = compose.inside("relay", "sh", "-c", planted, check=False)
    minutes.note("nothing is imported from where a process starts", "dovecote" in output.lower(), output)


def monitoring(compose: Compose, minutes: Minutes) -> None:
    scaled = ("up", "-d", "--no-build", "--scale", "pricing=3", "prometheus", *_PROCESSES)
    compose("--profile", "monitoring", *scaled, within=300)
    wait_for(lambda: not unhealthy(compose, (*_PROCESSES, "prometheus")), 120, str(unhealthy(compose, _PROCESSES)))

    def scraped() -> dict[str, int]:
        url = "http://prometheus:9090/api/v1/query?query=count%20by%20(service)%20(up%3D%3D1)"
        output = json.loads(compose.inside("relay", "python", "-c", _ASK, url))
        return {one["metric"].get("service", ""): int(one["value"][1]) for one in output["data"]["result"]}

    wanted = {"relay": 1, "relay-2": 1, "pricing": 3, "billing": 1, "verification": 1}
    with suppress(AssertionError):  # what it found instead is printed below
        wait_for(lambda: scraped() == wanted, 90, "all are scraped")
    minutes.note("with --scale pricing=3 Prometheus scrapes all three, and the others", scraped() == wanted, scraped())
    (server,) = inspect(compose, compose.containers("postgres"))
    address = next(iter(server["NetworkSettings"]["Networks"].values()))["IPAddress"]
    for target, by in (("postgres", "name"), (address, "address")):
        if by == "address" and not compose.engine.isolates:
            say("        left out: by address; this machine has rules of its own, and our engine sets none beside them")
            continue
        output = compose.inside("prometheus", "bash", "-c", _OPEN, target, "5432", check=False)
        minutes.note(f"Prometheus reaches no Postgres by {by}", "open" not in output, output)
    output = compose.inside("prometheus", "bash", "-c", _OPEN, "pricing", "9464", check=False)
    minutes.note("and does reach the metrics' port in just that way", "open" in output, output)
    ways = compose.engine.docker("network", "inspect", "-f", "{{.Internal}}", "dovecote_data", "dovecote_metrics")
    minutes.note("the networks of data and metrics have no way out", ways.split() == ["true", "true"], ways)


def renewal(compose: Compose, minutes: Minutes) -> None:
    made = compose.place / "containers" / "secrets"
    old = (made / "database_url_relay").read_text(encoding="utf-8")
    (made / "database_url_relay").unlink()
    compose.engine.run([str(made.parent / "make-secrets")])

    def renewed() -> None:
        assert (made / "database_url_relay").read_text(encoding="utf-8") != old
        up(compose, "--force-recreate", "migrate", "relay", "relay-2", services=("relay", "relay-2"))

    minutes.run("a password is renewed by removing its file, make-secrets and up", renewed)


def managed(compose: Compose, minutes: Minutes) -> None:
    """On servers that are not this project's: those of the first one stand for them, reached by another name."""
    place = compose.engine.place / "managed"
    copy_project(place)
    compose.engine.run([str(place / "containers" / "make-secrets")])
    secrets = compose.place / "containers" / "secrets"
    owner = (secrets / "database_url_owner").read_text(encoding="utf-8").strip()
    worker = (secrets / "redis_url_worker").read_text(encoding="utf-8").strip()
    compose.once("migrate", "python", "-c", _CREATE_DATABASE)
    (place / ".env").write_text(
        f"DATABASE_URL={owner.replace('@postgres', '@db.example').removesuffix('/dovecote')}/elsewhere\n"
        f"REDIS_URL={worker.replace('@redis', '@cache.example').removesuffix('/0')}/3\n",
        encoding="utf-8",
    )
    other = Compose(compose.engine, place, "elsewhere", "docker-compose.managed.yml")
    services = ("migrate", *_PROCESSES)
    # For the network only. All of them would wait for `migrate` to have ended.
    other("up", "--no-start", "--no-build", "--no-deps", "migrate")
    for service, alias in (("postgres", "db.example"), ("redis", "cache.example")):
        (server,) = compose.containers(service)
        compose.engine.docker("network", "connect", "--alias", alias, "elsewhere_outside", server)

    def runs() -> None:
        other("up", "-d", "--no-build", "--no-deps", *services)
        wait_for(lambda: not unhealthy(other, _PROCESSES), 120, str(unhealthy(other, _PROCESSES)))
        output = other.once("verification", "dovecote", "demo", "--events", "50", "--json", check=False)
        assert '"lost": 0' in output, output
        assert '"processed": 50' in output, output

    minutes.run("on servers of one's own, by DATABASE_URL and REDIS_URL of .env: demo loses nothing", runs)
    minutes.note("and the bundled servers were not started", not other.containers("postgres", "redis"))
    other("down", "--timeout", "30", check=False)
    for service in ("postgres", "redis"):
        compose.engine.docker("network", "disconnect", "elsewhere_outside", compose.containers(service)[0], check=False)
    other("down", check=False)


def stop(compose: Compose, minutes: Minutes) -> None:
    everyone = [one for name in ("postgres", "redis", "prometheus", *_PROCESSES) for one in compose.containers(name)]
    began = time.monotonic()
    compose("--profile", "monitoring", "stop", within=300)
    took = time.monotonic() - began
    codes = {one["Name"].lstrip("/"): one["State"]["ExitCode"] for one in inspect(compose, everyone)}
    whole = set(codes.values()) == {0} and took < 60
    minutes.note(f"stop ends every container with 0, within {took:.0f} s", whole, codes)
    killed = [one["Name"] for one in inspect(compose, everyone) if one["State"]["OOMKilled"]]
    minutes.note("none had to be killed for its memory", not killed, killed)
