"""What happened: what the writers committed, by their own account, and every effect that there is.

Nothing here asks the outbox, `processed_events` or `deliveries`: those are what is being checked.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import TupleRow

from tests.chaos import careless


@dataclass(frozen=True)
class Committed:
    """An event of a transaction that committed. `at` is Unix seconds, when the writer knew."""

    id: str
    account: str
    seq: int
    cents: int
    at: float


@dataclass(frozen=True)
class Effect:
    """One row that a handler left. `step` is the true order of effects on the account; ordered handlers only."""

    handler: str
    event_id: str
    account: str
    seq: int
    step: int | None
    at: float


@dataclass(frozen=True)
class History:
    """Shape:   `ledger` is account to (steps, cents); `charged` holds the provider's idempotency keys;
    `mistakes` and `reported` are (handler, event id): what careless handlers did wrong, and what was said of it;
    `contradictions` are sentences: where a writer and Postgres do not agree on what was committed.
    """

    handlers: tuple[str, ...]
    ordered: tuple[str, ...]
    committed: Mapping[str, Committed]
    effects: tuple[Effect, ...]
    ledger: Mapping[str, tuple[int, int]]
    charged: frozenset[str]
    mistakes: frozenset[tuple[str, str]] = frozenset()
    reported: frozenset[tuple[str, str]] = frozenset()
    rolled_back: int = 0
    contradictions: tuple[str, ...] = ()


def read_journals(lines: Iterable[Mapping[str, Any]], marked: set[str]) -> tuple[dict[str, Committed], int, list[str]]:
    """Return the events that were committed, the count of roll-backs, and contradictions.

    `marked` are the transactions that left their row: the answer where the writer never heard one.
    """
    asked: dict[str, Mapping[str, Any]] = {}
    heard: dict[str, float] = {}
    rolled_back = 0
    contradictions: list[str] = []
    for line in lines:
        if "events" in line:
            asked[line["transaction"]] = line
        elif "committed" in line:
            heard[line["transaction"]] = line["at"]
        elif "contradiction" in line:
            contradictions.append(line["contradiction"])
        else:
            rolled_back += line.get("rolled_back", 0)
    committed = {
        event["id"]: Committed(**event, at=heard.get(id, line["at"]))
        for id, line in asked.items()
        if id in marked or id in heard
        for event in line["events"]
    }
    contradictions += [
        f"transaction {id}: the writer heard of a commit that Postgres lost" for id in heard.keys() - marked
    ]
    contradictions += [f"transaction {id}: committed, and no writer ever asked for it" for id in marked - asked.keys()]
    return committed, rolled_back + len(asked.keys() - marked - heard.keys()), contradictions


def collect(
    directory: Path, connection: psycopg.Connection[TupleRow], handlers: tuple[str, ...], ordered: tuple[str, ...]
) -> History:
    """Read everything, once the system is quiet."""
    lines = [line for file in sorted((directory / "journals").glob("*.jsonl")) for line in _lines(file)]
    marked = {str(id) for (id,) in connection.execute("select id from chaos.transactions")}
    committed, rolled_back, contradictions = read_journals(lines, marked)
    sums = {account: (seq, cents) for account, seq, cents in connection.execute("table chaos.accounts")}
    contradictions += _wrong_sums(committed.values(), sums)
    effects = connection.execute(
        "select handler, event_id::text, account, seq, step, extract(epoch from at)::float8 from chaos.effects"
    )
    return History(
        handlers=handlers,
        ordered=ordered,
        committed=committed,
        effects=tuple(Effect(*row) for row in effects),
        ledger={
            account: (step, cents)
            for account, step, cents in connection.execute("select account, step, cents::bigint from chaos.ledger")
        },
        charged=frozenset(line["key"] for line in _lines(directory / "provider.jsonl")),
        mistakes=frozenset(
            (handler, id) for handler in careless.HANDLERS for id in committed if careless.is_mishandled(UUID(id))
        ),
        reported=frozenset(connection.execute("select handler, event_id::text from chaos.reports").fetchall()),
        rolled_back=rolled_back,
        contradictions=tuple(contradictions),
    )


def _wrong_sums(committed: Iterable[Committed], accounts: Mapping[str, tuple[int, int]]) -> list[str]:
    """Compare the journals with the writers' own table, so that a hole in the journals is seen."""
    told: dict[str, tuple[int, int]] = dict.fromkeys(accounts, (0, 0))
    for event in committed:
        count, cents = told.get(event.account, (0, 0))
        told[event.account] = count + 1, cents + event.cents
    return [
        f"{account}: the journals tell of {told.get(account)} facts and cents, its row of {row}"
        for account, row in accounts.items()
        if told.get(account) != row
    ]


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
