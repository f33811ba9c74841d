"""Judge a history: plain functions of what was committed and what took effect."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tests.chaos.history import Effect, History
from tests.chaos.schedule import Fault


@dataclass(frozen=True)
class Verdict:
    """Every broken promise, as a sentence that names the event.

    lost             committed, and a handler never acted on it
    doubled          acted on more than once by the same handler
    never_committed  acted on, although no transaction with it committed
    phantoms         acted on after Postgres had gone back in time and forgotten it
    out_of_order     took effect after a later event of its aggregate, for an ordered handler
    wrong_sums       ledger, provider or journals that do not come to what was committed
    unreported       a handler's mistake that is no failure of it in `deliveries`
    """

    lost: tuple[str, ...]
    doubled: tuple[str, ...]
    never_committed: tuple[str, ...]
    phantoms: tuple[str, ...]
    out_of_order: tuple[str, ...]
    wrong_sums: tuple[str, ...]
    unreported: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        return (
            *self.lost,
            *self.doubled,
            *self.never_committed,
            *self.phantoms,
            *self.out_of_order,
            *self.wrong_sums,
            *self.unreported,
        )

    @property
    def kept(self) -> bool:
        return not self.sentences


def judge(history: History) -> Verdict:
    """Hold the history against the promises P1, P2, P4 and P10 of the design.

    What Postgres remembers at the end counts. An effect of an event that it forgot went with it; one that is there was
    left afterwards. The provider forgets nothing: it may have been asked by a handler that was running when Postgres
    went back, and by none that began later.
    """
    counts = Counter((effect.handler, effect.event_id) for effect in history.effects)
    return Verdict(
        lost=tuple(
            f"{handler} never acted on {event.id}, event {event.seq} of {event.account}"
            for handler in history.handlers
            for event in history.committed.values()
            if (handler, event.id) not in counts
        ),
        doubled=tuple(
            f"{handler} acted {count} times on {event_id}" for (handler, event_id), count in counts.items() if count > 1
        ),
        never_committed=tuple(
            f"{handler} acted on {event_id}, which was rolled back"
            for handler, event_id in counts
            if event_id not in history.committed and event_id not in history.forgotten
        ),
        phantoms=(
            *(
                f"{handler} acted on {event_id}, which Postgres had forgotten"
                for handler, event_id in counts
                if event_id in history.forgotten
            ),
            *(
                f"the provider was asked for {event_id}, which Postgres had forgotten"
                for event_id in _asked_late(history)
            ),
        ),
        out_of_order=tuple(_out_of_order(history)),
        wrong_sums=tuple(_wrong_sums(history)),
        unreported=tuple(
            f"{handler} made a mistake with {event_id}, and no failure was recorded"
            for handler, event_id in sorted(history.mistakes - history.reported)
        ),
    )


def _asked_late(history: History) -> list[str]:
    return sorted(
        {
            charge.event_id
            for charge in history.charges
            if charge.event_id in history.forgotten and charge.began_at > history.forgotten[charge.event_id].at
        }
    )


def _out_of_order(history: History) -> Iterable[str]:
    streams: dict[tuple[str, str], list[Effect]] = defaultdict(list)
    for effect in history.effects:
        # The numbers of what was forgotten were given again.
        if effect.handler in history.ordered and effect.event_id not in history.forgotten:
            streams[effect.handler, effect.account].append(effect)
    for (handler, account), effects in streams.items():
        highest = 0
        for effect in sorted(effects, key=lambda effect: effect.step or 0):
            if effect.seq < highest:
                yield f"{handler} acted on event {effect.seq} of {account} after event {highest}"
            highest = max(highest, effect.seq)


def _wrong_sums(history: History) -> Iterable[str]:
    yield from history.contradictions
    wanted: dict[str, tuple[int, int]] = {}
    for event in history.committed.values():
        count, cents = wanted.get(event.account, (0, 0))
        wanted[event.account] = count + 1, cents + event.cents
    for account in sorted(wanted.keys() | history.ledger.keys()):
        if history.ledger.get(account) != wanted.get(account):
            yield f"{account}: the ledger has {history.ledger.get(account)} steps and cents, not {wanted.get(account)}"
    charged = {charge.event_id for charge in history.charges}
    yield from (f"the provider was never asked for {id}" for id in sorted(history.committed.keys() - charged))
    yield from (
        f"the provider was asked for {id}, which was rolled back"
        for id in sorted(charged - history.committed.keys() - history.forgotten.keys())
    )


def longest_stall_seconds(history: History) -> float:
    """Return the longest time without any effect while an event was due, to the last effect there is."""
    done_at = _last_effects(history)
    # Events by the time they were done: what is due at any time is a suffix of this.
    due = sorted((done, history.committed[id].at) for id, done in done_at.items())
    if not due:
        return 0.0
    oldest_due = [0.0] * len(due)
    oldest = float("inf")
    for index in range(len(due) - 1, -1, -1):
        oldest = oldest_due[index] = min(oldest, due[index][1])
    longest, index = 0.0, 0
    times = sorted(effect.at for effect in history.effects)
    for before, after in pairwise([min(event.at for event in history.committed.values()), *times]):
        while index < len(due) and due[index][0] <= before:
            index += 1
        if index < len(due):
            longest = max(longest, after - max(before, oldest_due[index]))
    return longest


def recovery_seconds(history: History, faults: Sequence[tuple[Fault, float]]) -> Mapping[str, list[float]]:
    """Return, for each kind, how long after each fault's end everything committed before that end was done.

    Shape:   `faults` are those that took place, with the Unix seconds at which each ended.
    Note:    faults overlap, and what another one delayed counts here too: these are upper bounds.
    """
    done_at = _last_effects(history)
    by_commit = sorted((history.committed[id].at, done) for id, done in done_at.items())
    found: dict[str, list[float]] = defaultdict(list)
    for fault, ended_at in faults:
        latest = max((done for at, done in by_commit if at <= ended_at), default=ended_at)
        found[fault.kind].append(max(0.0, latest - ended_at))
    return dict(sorted(found.items()))


def _last_effects(history: History) -> dict[str, float]:
    """Return when each committed event had its last effect."""
    done: dict[str, float] = {}
    for effect in history.effects:
        if effect.event_id in history.committed:
            done[effect.event_id] = max(done.get(effect.event_id, 0.0), effect.at)
    return done
