"""One process of a system whose handler can be counted and held: `relay` or `consumers`. Tests kill it."""

import signal
import sys
import threading
import time
from pathlib import Path

import dramatiq
from sqlalchemy import text

from domain.pricing import PriceQuoted
from dovecote.bootstrap import relay_for
from dovecote.processes.children import die_with_parent
from dovecote.route import Dovecote
from dovecote.unit_of_work import UnitOfWork
from tests.conftest import settings_for
from tests.support.effects import a_route, note_as
from tests.support.system import system_for
from workers.gateways import Gateways

#: The price of an event that is acted on while a test releases the advisory lock of that number.
HELD = 4_711


def note(event: PriceQuoted, uow: UnitOfWork, _gateways: Gateways) -> None:
    note_as("test.note", event, uow)
    if event.price == HELD:
        uow.session.execute(text(f"select pg_advisory_xact_lock({HELD})"))
    time.sleep(0.0005)  # so that a kill finds it in flight


ROUTE = a_route(function=note, ordered=True, replayable=True, bundle_size=50)


def main(part: str, database_url: str, redis_url: str, namespace: str, home: str, *more: str) -> None:
    """`more` are settings, NAME=VALUE; what is not among them is as in production."""
    die_with_parent(signal.SIGKILL)
    variables = {"DOVECOTE_REDIS__NAMESPACE": namespace, **dict(word.split("=", 1) for word in more)}
    settings = settings_for(database_url, redis_url, Path(home), **variables)
    if part == "relay":
        relay_for(settings, Dovecote(routes=(ROUTE,))).run()
        return
    with system_for(settings, (ROUTE,)) as system:
        dramatiq.Worker(system.broker, queues={ROUTE.queue}, worker_threads=3, worker_timeout=100).start()
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
