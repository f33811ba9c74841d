"""A service's writers: each loads an aggregate, changes it and commits, with or without telling it.

As our guide to writing events shows it: `unit_of_work`, a repository, a method of the aggregate. A process has one
connection.
"""

import json
import multiprocessing
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from itertools import cycle
from multiprocessing.connection import Connection

from sqlalchemy import text

from domain import billing
from domain.billing.repository import Memberships
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import UnitOfWork, unit_of_work

#: Makes the payload 300 bytes long.
_USER_ID = "user-" + "x" * 59
_HEADERS = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}
_AGGREGATES = 50
_NAIVE = text(
    """
    insert into naive.outbox (aggregate_type, aggregate_id, event_type, payload, headers)
    values ('membership', :id, :type, cast(:payload as jsonb), cast(:headers as jsonb))
    """
)


class Service:
    """Writer processes, each with a connection to every database.

    `databases` gives each variant's URL and what a transaction there writes beside its row: nothing, naive or outbox.
    """

    def __init__(self, databases: Mapping[str, tuple[str, str]], writers: int = 8) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        for _ in range(writers):
            ours, theirs = context.Pipe()
            context.Process(target=_serve, args=(databases, theirs), daemon=True).start()
            self._ends.append(ours)
        for end in self._ends:
            end.recv()

    def write(self, variant: str, seconds: float) -> float:
        """Let all write at once; return the transactions a second."""
        for end in self._ends:
            end.send((variant, seconds))
        return float(sum(end.recv() for end in self._ends))

    def close(self) -> None:
        for end in self._ends:
            end.close()


class _Writer:
    def __init__(self, url: str, writes_to: str) -> None:
        self._sessions = sessions_for(connect(url, pool_size=1))
        self._writes_to = writes_to
        self._began_at = began_at = datetime(2026, 1, 1, tzinfo=UTC)
        with unit_of_work(self._sessions) as uow:
            ids = [
                billing.start_membership(uow, _USER_ID, billing.Tier.MONTHLY, began_at).id for _ in range(_AGGREGATES)
            ]
            for id in ids:
                billing.activate_membership(uow, id, began_at, until=began_at + timedelta(days=30))
        self._ids = cycle(ids)

    def write(self, seconds: float) -> float:
        done, began = 0, time.monotonic()
        while time.monotonic() < began + seconds:
            self._transaction()
            done += 1
        return done / (time.monotonic() - began)

    def _transaction(self) -> None:
        with unit_of_work(self._sessions, _HEADERS) as uow:
            membership = Memberships(uow).get(next(self._ids))
            assert membership.current_period_end is not None, "an active monthly membership has a period"
            renewed = membership.renew(membership.current_period_end + timedelta(days=1), self._began_at)
            if self._writes_to == "outbox":
                uow.emit(renewed)
            elif self._writes_to == "naive":
                _write_naively(uow, renewed)


def _serve(databases: Mapping[str, tuple[str, str]], end: Connection) -> None:
    writers = {name: _Writer(url, writes_to) for name, (url, writes_to) in databases.items()}
    end.send("ready")
    try:
        while True:
            variant, seconds = end.recv()
            end.send(writers[variant].write(seconds))
    except EOFError:
        return


def _write_naively(uow: UnitOfWork, event: billing.MembershipRenewed) -> None:
    uow.session.flush()
    uow.session.execute(
        _NAIVE,
        {
            "id": event.aggregate_id,
            "type": event.type,
            "payload": json.dumps(event.payload()),
            "headers": json.dumps(_HEADERS),
        },
    )
