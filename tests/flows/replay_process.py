"""One process of a system whose handler can be counted: `relay` or `consumers`. Tests kill it."""

import signal
import sys
import threading
import time
from pathlib import Path

import dramatiq

from domain.pricing import PriceQuoted
from domain.unit_of_work import UnitOfWork
from tests.conftest import settings_for
from tests.effects import a_route, note_as
from tests.system import system_for
from workers.bootstrap import relay_for
from workers.children import die_with_parent
from workers.gateways import Gateways


def note(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
    note_as("test.note", event, uow)
    time.sleep(0.0005)  # so that a kill finds it at work


ROUTE = a_route(act=note, ordered=True, replayable=True, bundle_size=50)


def main(part: str, database_url: str, redis_url: str, namespace: str, home: str) -> None:
    die_with_parent(signal.SIGKILL)
    variables = {
        "DOVECOTE_REDIS__NAMESPACE": namespace,
        "DOVECOTE_CONSUMERS__HEARTBEAT_TIMEOUT_MS": "1000",
        "DOVECOTE_RELAY__STANDBY_SECONDS": "0.1",
    }
    settings = settings_for(database_url, redis_url, Path(home), **variables)
    if part == "relay":
        relay_for(settings, (ROUTE,)).run()
        return
    with system_for(settings, (ROUTE,)) as system:
        dramatiq.Worker(system.broker, queues={ROUTE.queue}, worker_threads=3, worker_timeout=100).start()
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
