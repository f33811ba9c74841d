"""What the system under test does: one event type, six handlers, and tables in which every effect can be counted.

Nothing in these tables stops an effect from happening twice, in the wrong order or not at all: that is
what Dovecote is there for. Run as the processes of the system only; pytest never imports it.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text

from dovecote.database import array
from dovecote.envelope import Envelope
from dovecote.errors import GatewayUnavailable
from dovecote.events import Event
from dovecote.route import Route
from dovecote.unit_of_work import UnitOfWork
from tests.chaos import careless
from tests.chaos.clocks import real_time
from workers.gateways import Gateways

TABLES = (
    """
create schema chaos;
-- The writers' state: how many events each account has emitted, and their sum.
create table chaos.accounts (id text primary key, seq bigint not null default 0, cents bigint not null default 0);
-- One row for each transaction that committed: the answer where a writer never heard one.
create table chaos.transactions (id uuid primary key);
-- What the ordered handler keeps; `step` is counted under the row's lock, so it is the true order of effects.
create table chaos.ledger (account text primary key, step bigint not null, cents bigint not null);
create table chaos.effects (
    handler text not null, event_id uuid not null, account text not null, seq bigint not null, step bigint,
    at timestamptz not null default clock_timestamp()
);
"""
    + careless.TABLES
)


@dataclass(frozen=True, kw_only=True)
class AmountMoved(Event, type="chaos.amount_moved.v1", aggregate="chaos_account", key="account"):
    """The `seq`-th event of an account, counted from 1 under the lock of its row."""

    account: str
    seq: int
    cents: int


class BadLuck(Exception):
    """A handler failed, as handlers do."""


def _fail_at(rate: float, error: Exception) -> None:
    if random.random() < rate:
        raise error


_note = text(
    "insert into chaos.effects (handler, event_id, account, seq, step)"
    " values (:handler, :event_id, :account, :seq, :step)"
)


def _note_effect(handler: str, event: AmountMoved, uow: UnitOfWork, step: int | None = None) -> None:
    uow.session.execute(
        _note,
        {"handler": handler, "event_id": event.event_id, "account": event.account, "seq": event.seq, "step": step},
    )


_enter = text(
    "insert into chaos.ledger as known (account, step, cents) values (:account, 1, :cents)"
    " on conflict (account) do update set step = known.step + 1, cents = known.cents + excluded.cents returning step"
)


def enter_in_ledger(event: AmountMoved, uow: UnitOfWork, _gateways: Gateways) -> None:
    """In order. It fails after the effect, which must then be undone while later events wait."""
    step = uow.session.execute(_enter, {"account": event.account, "cents": event.cents}).scalar_one()
    _note_effect("chaos.ledger", event, uow, step)
    _fail_at(0.002, BadLuck("the ledger's pen broke"))


_note_all = text(
    "insert into chaos.effects (handler, event_id, account, seq) select cast(:handler as text), * from"
    " unnest(cast(:ids as uuid[]), cast(:accounts as text[]), cast(:seqs as bigint[]))"
)


def count_in_bulk(envelopes: Sequence[Envelope], uow: UnitOfWork, _gateways: Gateways) -> None:
    """Unordered, the whole bundle with one statement."""
    _note_effects("chaos.bulk", envelopes, uow)


def _note_effects(handler: str, envelopes: Sequence[Envelope], uow: UnitOfWork) -> None:
    uow.session.execute(
        _note_all,
        {
            "handler": handler,
            "ids": array(envelope.event_id for envelope in envelopes),
            "accounts": array(envelope.data["account"] for envelope in envelopes),
            "seqs": array(envelope.data["seq"] for envelope in envelopes),
        },
    )


def act_with_luck(event: AmountMoved, uow: UnitOfWork, _gateways: Gateways) -> None:
    """Fails at random, often enough that every event of a bundle is tried alone now and then."""
    _note_effect("chaos.luck", event, uow)
    _fail_at(0.01, BadLuck("no luck"))


def pay(event: AmountMoved, uow: UnitOfWork, _gateways: Gateways) -> None:
    """Calls the outside world. A crash between the call and the commit calls again, with the same key."""
    _note_effect("chaos.pay", event, uow)
    began_at = uow.session.scalar(_began_at)
    charge(Path(os.environ["CHAOS_DIRECTORY"]), str(event.event_id), event.cents, began_at)


#: When the transaction began: by the clock of Postgres, which is right, and in the run of Postgres that it is in.
_began_at = text("select extract(epoch from transaction_timestamp())::float8")


def charge(directory: Path, idempotency_key: str, cents: int, began_at: float) -> None:
    """A provider that is away at times, and at times does it and does not say so. A second charge is no charge."""
    _fail_at(0.005, GatewayUnavailable("the provider is away"))
    line = json.dumps({"key": idempotency_key, "cents": cents, "began_at": began_at, "at": real_time()}) + "\n"
    with (directory / "provider.jsonl").open("ab", buffering=0) as file:
        file.write(line.encode())  # one write, appended whole
    _fail_at(0.003, GatewayUnavailable("the provider's answer was lost"))


def act_carelessly(event: AmountMoved, uow: UnitOfWork, _gateways: Gateways) -> object:
    """Ends the transaction it was lent, swallows errors, leaves settings behind: for some events, until corrected."""
    _note_effect("chaos.careless", event, uow)
    return careless.mishandle("chaos.careless", [event.event_id], uow.session)


def act_carelessly_in_bulk(envelopes: Sequence[Envelope], uow: UnitOfWork, _gateways: Gateways) -> object:
    """The same with the first such event of a bundle; the others of the bundle must not suffer."""
    _note_effects("chaos.careless_bulk", envelopes, uow)
    return careless.mishandle("chaos.careless_bulk", (envelope.event_id for envelope in envelopes), uow.session)


# A try costs little here, and no event may die of bad luck.
_PATIENT = {"max_attempts": 1_000, "backoff_seconds": 0.05, "max_backoff_seconds": 0.5}


def _route(handler: str, act: object, queue: str, **more: object) -> Route:
    return Route(handler=handler, events=(AmountMoved,), function=act, queue=queue, **{**_PATIENT, **more})  # type: ignore[arg-type]  # keywords of many types


ROUTES = (
    _route("chaos.ledger", enter_in_ledger, "ordered", ordered=True),
    _route("chaos.bulk", count_in_bulk, "unordered", bulk=True),
    _route("chaos.luck", act_with_luck, "unordered", bundle_size=50),
    _route("chaos.pay", pay, "unordered", bundle_size=20),
    _route("chaos.careless", act_carelessly, "unordered", bundle_size=50),
    _route("chaos.careless_bulk", act_carelessly_in_bulk, "unordered", bulk=True),
)
HANDLERS = tuple(route.handler for route in ROUTES)
ORDERED = tuple(route.handler for route in ROUTES if route.ordered)

PROCFILE = """\
relay: python -m tests.chaos.processes
relay-2: python -m tests.chaos.processes
ordered: dramatiq tests.chaos.processes:consumers --queues ordered --processes 2 --threads 2 --skip-logging \
--worker-shutdown-timeout 20000
unordered: dramatiq tests.chaos.processes:consumers --queues unordered --processes 2 --threads 2 --skip-logging \
--worker-shutdown-timeout 20000
"""
