"""A service that writes events, and a journal of what it did that does not depend on the outbox.

Before it asks for a commit it appends what it is about to commit to a file of its own; afterwards, what it
heard. A writer that is killed, or whose answer got lost, leaves the first line only: then the row in
`chaos.transactions`, written by the same transaction, says what became of it.
"""

import json
import os
import random
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import MetaData, text
from sqlalchemy.event import listen
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dovecote.errors import ConcurrentChange, DovecoteError
from dovecote.events.ids import uuid7
from dovecote.store.connections import connect, sessions_for
from dovecote.telemetry.failures import is_transient
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from tests.chaos.clocks import real_time
from tests.chaos.processes import enter
from tests.chaos.routes import AmountMoved

ACCOUNTS = 40

_open = text("insert into chaos.accounts (id) values (:account) on conflict do nothing")
_move = text("update chaos.accounts set seq = seq + 1, cents = cents + :cents where id = :account returning seq")
# For writers in other languages; the event gets its position here and now, not at the commit.
_append = text("select dovecote.append_event('chaos_account', :account, :type, cast(:payload as jsonb))")


class Base(DeclarativeBase):
    metadata = MetaData(schema="chaos")


class Mark(Base):
    """The row that each transaction leaves; added last, so that the commit itself has something to flush."""

    __tablename__ = "transactions"

    id: Mapped[UUID] = mapped_column(primary_key=True)


#: Hooks of SQLAlchemy in which services emit what their aggregates have collected; None is a service that emits itself.
_HOOKS = (None, None, None, "before_flush", "after_flush", "after_flush_postexec", "before_commit")


class ChangedItsMind(Exception):
    """The service rolls back."""


class Journal:
    """Append-only lines, each written whole: a kill leaves no half of one."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("ab", buffering=0)

    def write(self, **line: Any) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")


class Transaction:
    """One transaction over several accounts; what was rolled back to a savepoint is not in `events`."""

    def __init__(self, uow: UnitOfWork, chance: random.Random) -> None:
        self._uow = uow
        self._chance = chance
        # An event that waits for the commit comes after one written at once: never both in one transaction.
        self._through_sql = chance.random() < 0.3
        self.events: list[dict[str, Any]] = []
        self._collected: list[AmountMoved] = []
        self._hook = None if self._through_sql else chance.choice(_HOOKS)
        if self._hook:
            listen(uow.session, self._hook, self._emit_collected)

    def work(self) -> None:
        # In any order: two writers that want the same accounts deadlock now and then, as services do.
        accounts = self._chance.sample(range(ACCOUNTS), self._chance.choice((1, 1, 2, 3, 5)))
        for account in accounts:
            for _ in range(self._chance.choice((1, 1, 1, 2)) if len(accounts) > 1 else self._chance.choice((1, 2, 40))):
                self._move(f"account-{account}")
            if self._chance.random() < 0.1:
                self._regret(f"account-{self._chance.randrange(ACCOUNTS)}")
            self._dawdle()

    def _move(self, account: str) -> None:
        cents = self._chance.randint(-10_000, 10_000)
        session = self._uow.session
        seq = session.execute(_move, {"account": account, "cents": cents}).scalar_one()
        event = AmountMoved(account=account, seq=seq, cents=cents, occurred_at=datetime.now(UTC))
        event_id = event.event_id
        if self._through_sql:
            values = {"account": account, "type": event.type, "payload": json.dumps(event.payload())}
            event_id = session.execute(_append, values).scalar_one()
        elif self._hook:
            self._collected.append(event)
        else:
            self._uow.emit(event)
        self.events.append({"id": str(event_id), "account": account, "seq": seq, "cents": cents})

    def _regret(self, account: str) -> None:
        before = len(self.events)
        try:
            with self._uow.session.begin_nested():
                self._move(account)
                raise ChangedItsMind
        except ChangedItsMind:
            del self.events[before:]
            kept = {event["id"] for event in self.events}
            self._collected = [event for event in self._collected if str(event.event_id) in kept]

    def _emit_collected(self, *_: object) -> None:
        collected, self._collected = self._collected, []
        for event in collected:
            self._uow.emit(event)

    def _dawdle(self) -> None:
        if self._chance.random() < 0.05:
            _pause.wait(self._chance.expovariate(5))
        if self._chance.random() < 0.002:
            _pause.wait(3)  # a stuck writer: its low-water mark holds the checkpoint back and may delay nobody else


_pause = threading.Event()


class Writer:
    """Writes until SIGTERM."""

    def __init__(self, url: str, journal: Journal, per_second: float) -> None:
        engine = connect(url, pool_size=1, application_name="chaos writer")
        self._sessions = sessions_for(engine)
        self._journal = journal
        self._chance = random.Random()
        self._per_second = per_second
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                self._one()
            except ChangedItsMind:
                self._journal.write(rolled_back=1)
            except Exception as error:
                if not is_transient(error) and not isinstance(error, ConcurrentChange):
                    raise
                self._journal.write(trouble=f"{type(error).__name__}: {error}"[:200], at=real_time())
                self.stopping.wait(0.2)
            self.stopping.wait(self._chance.expovariate(self._per_second))

    def _one(self) -> None:
        id = uuid7()
        with unit_of_work(self._sessions) as uow:
            transaction = Transaction(uow, self._chance)
            transaction.work()
            uow.session.add(Mark(id=id))
            if self._chance.random() < 0.15:
                raise ChangedItsMind
            self._journal.write(transaction=str(id), events=transaction.events, at=real_time())
        self._journal.write(transaction=str(id), committed=True, at=real_time())
        if self._chance.random() < 0.05:
            self._emit_too_late(uow)

    def _emit_too_late(self, uow: UnitOfWork) -> None:
        """A careless service uses its unit of work once more; that must be an error."""
        try:
            uow.emit(AmountMoved(account="account-0", seq=0, cents=0, occurred_at=datetime.now(UTC)))
        except DovecoteError:
            return
        self._journal.write(contradiction="a unit of work that had ended took an event")


def open_accounts(url: str) -> None:
    engine = connect(url)
    with engine.begin() as connection:
        for account in range(ACCOUNTS):
            connection.execute(_open, {"account": f"account-{account}"})
    engine.dispose()


def main(name: str, per_second: str) -> None:
    directory = enter("writers")
    # A file for each life: a writer that is killed never writes into the journal of the next.
    journal = Journal(directory / "journals" / f"{name}-{os.getpid()}-{uuid7().hex[-8:]}.jsonl")
    writer = Writer(os.environ["DATABASE_URL"], journal, float(per_second))
    signal.signal(signal.SIGTERM, lambda *_: writer.stopping.set())
    writer.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
