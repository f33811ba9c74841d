"""A Docker engine of our own, and substitutes for the images that docker-compose.yml and the Dockerfile ask for.

Nothing can be pulled where this runs. A substitute is a minimal Debian with the same program, under the same name and
tag, with an entry point that keeps to the variables, places and users of the real image. Everything is in one
directory and goes with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

SUITE = "trixie"
PACKAGES = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "docker-compose": "docker-compose",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "iptables-save": "iptables",
}
_BRIDGE = "dovecote0"
_BRIDGE_ADDRESS = "172.31.254.1/24"
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


class CannotRun(Exception):
    """What this machine lacks, in one sentence."""


class Substitute(NamedTuple):
    """A minimal Debian in place of an image. Hooks see its root as $1."""

    packages: str
    hooks: tuple[str, ...]
    changes: tuple[str, ...]


_ENTRY = 'ENTRYPOINT ["/usr/local/bin/entry"]'
_SUBSTITUTES = {
    "python": Substitute(
        "python3,python3-pip,python3-venv,ca-certificates",
        ('ln -s python3 "$1/usr/bin/python"', 'rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED'),
        ('CMD ["python3"]',),
    ),
    "postgres": Substitute(
        "postgresql,ca-certificates",
        (
            f'cp {HERE}/postgres-entry "$1/usr/local/bin/entry"',
            'rm -rf "$1"/var/lib/postgresql/*',
            'chroot "$1" install -d -o postgres -g postgres -m 1777 /var/lib/postgresql',
            'ln -s /usr/lib/postgresql/*/bin/pg_isready "$1/usr/local/bin/" || true',
        ),
        (_ENTRY, 'CMD ["postgres"]', "VOLUME /var/lib/postgresql", "EXPOSE 5432"),
    ),
    "redis": Substitute(
        "redis-server,redis-tools",
        (
            f'cp {HERE}/redis-entry "$1/usr/local/bin/entry"',
            'chroot "$1" install -d -o redis -g redis /data',
        ),
        (_ENTRY, 'CMD ["redis-server"]', "WORKDIR /data", "VOLUME /data", "EXPOSE 6379"),
    ),
    "prom/prometheus": Substitute(
        "prometheus",
        ('chroot "$1" install -d -o nobody -g nogroup /prometheus',),
        (
            'ENTRYPOINT ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", '
            '"--storage.tsdb.path=/prometheus"]',
            "USER nobody",
            "WORKDIR /prometheus",
            "VOLUME /prometheus",
        ),
    ),
}


def say(text: str) -> None:
    print(text, flush=True)


def install() -> None:
    """Install what is missing, where we may; CannotRun says what is."""
    if os.geteuid() != 0:
        raise CannotRun("a Docker engine of our own needs root: run this as root, or on a machine of CI")
    missing = sorted({package for word, package in PACKAGES.items() if shutil.which(word) is None})
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise CannotRun(f"no {', '.join(missing)} here, and no apt-get to install them with: run this on Debian")
    say(f"installing {', '.join(missing)} with apt-get")
    # Debian starts a service as soon as it is installed, unless policy-rc.d says no. We start our own engine.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
        policy.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
            done = subprocess.run(
                ["apt-get", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            if done.returncode != 0:
                raise CannotRun(f"apt-get {words[0]} failed: {done.stderr.strip()[-500:]}")
    finally:
        if ours:
            policy.unlink()


class Engine:
    """A dockerd and what talks to it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.socket = f"unix://{place}/docker.sock"
        self.isolates = False
        self.environment = {**os.environ, "DOCKER_HOST": self.socket, "COMPOSE_HTTP_TIMEOUT": "120"}

    def docker(self, *words: str, check: bool = True, within: float = 120) -> str:
        return self.run(["docker", *words], check=check, within=within)

    def run(self, command: list[str], *, check: bool = True, within: float = 120, cwd: Path | None = None) -> str:
        """Return what a command prints on stdout; with `check` it must succeed."""
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)[:300]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )
        return done.stdout if check else done.stdout + done.stderr


@contextmanager
def engine() -> Iterator[Engine]:
    """Run a dockerd with everything it has in a directory of its own; nothing of it stays."""
    place = Path(tempfile.mkdtemp(prefix="dovecote-containers-", dir="/var/tmp"))
    running = Engine(place)
    # Rules of our own keep networks apart, as any engine's do; where there are rules already, ours would meet them.
    running.isolates = not _rules()
    forwarding = _FORWARDING.read_text(encoding="utf-8")
    # Not docker0, which another engine may have.
    _ip("link", "add", _BRIDGE, "type", "bridge")
    _ip("addr", "add", _BRIDGE_ADDRESS, "dev", _BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    log = (place / "log").open("wb")
    daemon = subprocess.Popen(
        [
            "dockerd",
            f"--iptables={str(running.isolates).lower()}",
            f"--bridge={_BRIDGE}",
            f"--data-root={place}/data",
            f"--exec-root={place}/exec",
            f"--pidfile={place}/pid",
            f"--host={running.socket}",
        ],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        wait_for(lambda: "Server Version" in running.docker("info", check=False), 60, "the engine answers")
        yield running
    finally:
        for container in running.docker("ps", "-aq", check=False).split():
            running.docker("rm", "-f", container, check=False)
        for network in running.docker("network", "ls", "-q", "--filter", "type=custom", check=False).split():
            running.docker("network", "rm", network, check=False)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(60)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        log.close()
        _ip("link", "del", _BRIDGE)
        if running.isolates:
            _remove_rules()
        _FORWARDING.write_text(forwarding, encoding="utf-8")
        # Such as the network namespace of containers on the host's network.
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
            if (mount := line.split()[1]).startswith(f"{place}/"):
                subprocess.run(["umount", mount], capture_output=True, check=False)
        shutil.rmtree(place)


def images_named() -> list[str]:
    """Return every image that the compose file and the Dockerfile name and that is not made here."""
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    named = re.findall(r"^ +image: (\S+:\S+)$", compose, re.MULTILINE)
    named += re.findall(r"^FROM (\S+:\S+)", dockerfile, re.MULTILINE)
    return sorted(set(named))


def make_substitutes(running: Engine, cache: Path | None, wanted: tuple[str, ...] = tuple(_SUBSTITUTES)) -> None:
    """Make and import the substitutes; CannotRun where Debian's packages cannot be had."""
    place = cache or running.place / "bases"
    place.mkdir(parents=True, exist_ok=True)
    for image in images_named():
        name = image.partition(":")[0]
        if name not in wanted:
            continue
        substitute = _SUBSTITUTES[name]
        # What it is made of is in its name, entry points included, but not where this checkout is: a cache never serves
        # an older one, and serves every clone.
        parts = repr(substitute).replace(str(HERE), "") + "".join(
            path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*-entry"))
        )
        made_of = hashlib.sha256(parts.encode()).hexdigest()[:12]
        tar = place / f"{name.replace('/', '-')}-{SUITE}-{made_of}.tar"
        if not tar.exists():
            _bootstrap(substitute, tar)
        changes = [*substitute.changes, "ENV LANG=C.UTF-8", *_pip_settings()]
        running.docker("import", *(word for change in changes for word in ("-c", change)), str(tar), image, within=300)
        say(f"substitute for {image}: Debian {SUITE} with {substitute.packages.split(',', maxsplit=1)[0]}")


def _bootstrap(substitute: Substitute, tar: Path) -> None:
    ask = ["apt-get", "indextargets", "--format", "$(SITE)"]
    sites = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    mirror = next((site for site in sorted(set(sites)) if "security" not in site), None)
    if mirror is None:
        raise CannotRun("apt names no mirror to take Debian's packages from")
    # The certificates of this machine: pip in the image must believe the same ones.
    certificates = 'mkdir -p "$1/etc/ssl/certs" && cp /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"'
    hooks = [*substitute.hooks, certificates]
    new = tar.with_name(f"new-{tar.name}")
    done = subprocess.run(
        [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            "--mode=root",
            "--aptopt=Acquire::Check-Valid-Until=false",
            f"--include={substitute.packages}",
            *(f"--customize-hook={hook}" for hook in hooks),
            SUITE,
            str(new),
            mirror,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        raise CannotRun(f"mmdebstrap could not make a Debian {SUITE}: {done.stderr.strip()[-800:]}")
    new.rename(tar)


def _pip_settings() -> list[str]:
    """Return the settings that pip in the image needs to reach the index that pip here reaches."""
    given = [f"ENV {name}={value}" for name, value in os.environ.items() if name in ("PIP_INDEX_URL", "PIP_CERT")]
    return [*given, "ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"]


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotRun(f"`ip {' '.join(words)}` failed ({done.stderr.strip()}): no bridge for containers can be made")


def _rules() -> list[str]:
    saved = subprocess.run(["iptables-save"], capture_output=True, text=True, check=False)
    return [line for line in saved.stdout.splitlines() if line.startswith("-A")]


def _remove_rules() -> None:
    """Take away what the engine set: there was nothing before it."""
    for table in ("filter", "nat"):
        for words in (["-F"], ["-X"]):
            subprocess.run(["iptables", "-t", table, *words], capture_output=True, check=False)
    subprocess.run(["iptables", "-P", "FORWARD", "ACCEPT"], capture_output=True, check=False)


def wait_for(condition: object, within_seconds: float, what: str) -> None:
    """Wait until `condition()` is true; AssertionError naming `what` after the deadline."""
    assert callable(condition)
    deadline = time.monotonic() + within_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_seconds:g} s: {what}")
        time.sleep(0.3)  # between two questions: this is how all else here awaits a condition
