"""Run docker-compose.yml for real, where root and Debian are there. Standard library only.

    tests/containers/run                   the system: up, checked from inside, scaled, rotated, stopped
    tests/containers/run --suite [ARGS]    the suite's server tests on containers; ARGS go to pytest
    tests/containers/run --cache DIR ...   keep the substitutes' file systems in DIR, and take them from there

It installs docker.io, docker-compose and mmdebstrap if they are missing, starts a dockerd of its own in a directory of
its own, makes substitutes for the images (engine.py), and takes all of it away again, but for the packages.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.containers import system
from tests.containers.engine import ROOT, CannotRun, engine, images_named, install, make_substitutes, say

_LONGEST_SECONDS = 1_500
_LONGEST_SUITE_SECONDS = 5_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="where the substitutes' file systems are kept")
    parser.add_argument("--suite", action="store_true", help="run pytest -m servers on containers instead")
    options, rest = parser.parse_known_args()
    if rest and not options.suite:
        parser.error(f"unknown: {' '.join(rest)}")
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_LONGEST_SUITE_SECONDS if options.suite else _LONGEST_SECONDS)
    cache = options.cache.absolute() if options.cache else None
    try:
        install()
        with engine() as running:
            if options.suite:
                make_substitutes(running, cache, ("postgres", "redis"))
                return _suite(running.socket, rest)
            make_substitutes(running, cache)
            return system.check(running)
    except CannotRun as error:
        say(f"tests/containers: left out, {error}")
        return 3


def _suite(socket: str, words: list[str]) -> int:
    """Run the server tests with the testcontainers fixture on our engine; it may not fall back to other servers."""
    images = {name.partition(":")[0]: name for name in images_named()}
    python = Path(os.environ.get("DOVECOTE_VENV") or ROOT / ".venv") / "bin" / "python"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "DOCKER_HOST": socket,
        "DOVECOTE_TEST_CONTAINERS": "1",
        # The reaper of testcontainers is one image more; what is left goes with our engine.
        "TESTCONTAINERS_RYUK_DISABLED": "true",
        "DOVECOTE_TEST_POSTGRES_IMAGE": images["postgres"],
        "DOVECOTE_TEST_REDIS_IMAGE": images["redis"],
    }
    for name in ("DATABASE_URL", "REDIS_URL"):
        environment.pop(name, None)
    return subprocess.run([str(python), "-m", "pytest", "-m", "servers", *words], cwd=ROOT, env=environment).returncode


def _end(*_: object) -> None:
    raise SystemExit(143)


def _too_long(*_: object) -> None:
    raise AssertionError("tests/containers took too long and was ended")


if __name__ == "__main__":
    sys.exit(main())
