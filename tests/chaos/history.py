"""What happened: what the writers committed, by their own account, and every effect that there is.

Postgres may have gone back in time and forgotten what it had answered. Positions and sequence numbers are given again
then; the id of an event is not.

Nothing here asks the outbox, `processed_events` or `deliveries`: those are what is being checked.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
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
class Rewind:
    """Postgres went back in time at `at`, all connections ended, and it remembers what it had answered before
    `remembered_until`. Both in Unix seconds. The next one begins after that.
    """

    remembered_until: float
    at: float


@dataclass(frozen=True)
class Forgotten:
    """An event that Postgres does not remember since `at`, Unix seconds.

    answered   its commit was; otherwise it may have been rolled back as well
    """

    id: str
    at: float
    answered: bool


@dataclass(frozen=True)
class Charge:
    """One call of the provider. `began_at`: when the handler's transaction began, by the clock of Postgres."""

    event_id: str
    began_at: float


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
    """Shape:   `committed` and `forgotten` are by event id; what Postgres does not remember is not in `committed`;
    `ledger` is account to (steps, cents); `mistakes` and `reported` are (handler, event id): what careless handlers did
    wrong, and what was said of it; `contradictions` are sentences: where a writer and Postgres do not agree on what was
    committed.
    """

    handlers: tuple[str, ...]
    ordered: tuple[str, ...]
    committed: Mapping[str, Committed]
    effects: tuple[Effect, ...]
    ledger: Mapping[str, tuple[int, int]]
    charges: tuple[Charge, ...]
    forgotten: Mapping[str, Forgotten] = field(default_factory=dict)
    mistakes: frozenset[tuple[str, str]] = frozenset()
    reported: frozenset[tuple[str, str]] = frozenset()
    rolled_back: int = 0
    contradictions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Journals:
    """What the writers' journals and the rows in `chaos.transactions` say together."""

    committed: dict[str, Committed]
    forgotten: dict[str, Forgotten]
    rolled_back: int
    contradictions: list[str]


def read_journals(lines: Iterable[Mapping[str, Any]], marked: set[str], rewinds: Sequence[Rewind] = ()) -> Journals:
    """Hold the journals against `marked`, the transactions whose row is there at the end.

    The row is the answer where the writer never heard one. A commit that was heard of and left no row is forgotten if
    Postgres went back at that time; otherwise it is a contradiction, and its events are still due.
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
    forgotten_at = {
        id: at
        for id, line in asked.items()
        if id not in marked and (at := _forgotten_at(line["at"], heard.get(id, inf), rewinds)) is not None
    }
    contradictions += [
        f"transaction {id}: the writer heard of a commit that Postgres lost"
        for id in heard.keys() - marked - forgotten_at.keys()
    ]
    contradictions += [f"transaction {id}: committed, and no writer ever asked for it" for id in marked - asked.keys()]
    return Journals(
        committed={
            event["id"]: Committed(**event, at=heard.get(id, line["at"]))
            for id, line in asked.items()
            if id in marked or (id in heard and id not in forgotten_at)
            for event in line["events"]
        },
        forgotten={
            event["id"]: Forgotten(event["id"], at, answered=id in heard)
            for id, at in forgotten_at.items()
            for event in asked[id]["events"]
        },
        rolled_back=rolled_back + len(asked.keys() - marked - heard.keys()),
        contradictions=contradictions,
    )


def _forgotten_at(asked: float, heard: float, rewinds: Iterable[Rewind]) -> float | None:
    """Return when Postgres went back behind a commit between these two times; None if it never did.

    It may have been the first time that it went back after the question, and no other: no commit outlives its
    connection, and what is remembered the first time is also remembered the second time.
    """
    first = next((one for one in rewinds if asked <= one.at), None)
    return first.at if first is not None and heard >= first.remembered_until else None


def collect(
    directory: Path,
    connection: psycopg.Connection[TupleRow],
    handlers: tuple[str, ...],
    ordered: tuple[str, ...],
    rewinds: Sequence[Rewind],
) -> History:
    """Read everything, once the system is quiet."""
    lines = [line for file in sorted((directory / "journals").glob("*.jsonl")) for line in _lines(file)]
    marked = {str(id) for (id,) in connection.execute("select id from chaos.transactions")}
    journals = read_journals(lines, marked, rewinds)
    sums = {account: (seq, cents) for account, seq, cents in connection.execute("table chaos.accounts")}
    effects = connection.execute(
        "select handler, event_id::text, account, seq, step, extract(epoch from at)::float8 from chaos.effects"
    )
    return History(
        handlers=handlers,
        ordered=ordered,
        committed=journals.committed,
        forgotten=journals.forgotten,
        effects=tuple(Effect(*row) for row in effects),
        ledger={
            account: (step, cents)
            for account, step, cents in connection.execute("select account, step, cents::bigint from chaos.ledger")
        },
        charges=tuple(Charge(line["key"], line["began_at"]) for line in _lines(directory / "provider.jsonl")),
        mistakes=frozenset(
            (handler, id)
            for handler in careless.HANDLERS
            for id in journals.committed
            if careless.is_mishandled(UUID(id))
        ),
        reported=frozenset(connection.execute("select handler, event_id::text from chaos.reports").fetchall()),
        rolled_back=journals.rolled_back,
        contradictions=(*journals.contradictions, *_wrong_sums(journals.committed.values(), sums)),
    )


def _wrong_sums(committed: Iterable[Committed], accounts: Mapping[str, tuple[int, int]]) -> list[str]:
    """Compare the journals with the writers' own table, so that a gap in the journals is seen."""
    journaled: dict[str, tuple[int, int]] = dict.fromkeys(accounts, (0, 0))
    for event in committed:
        count, cents = journaled.get(event.account, (0, 0))
        journaled[event.account] = count + 1, cents + event.cents
    return [
        f"{account}: the journals say {journaled.get(account)} (events, cents), its row {row}"
        for account, row in accounts.items()
        if journaled.get(account) != row
    ]


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
