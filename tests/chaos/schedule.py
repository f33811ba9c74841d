"""When which fault befalls what: a pure function of the seed.

Kinds come from a shuffled bag, so each one happens before any happens twice. Faults overlap as they like,
except on one part: a server that is down cannot be stopped again.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

_QUICKEST_START_SECONDS = 1.0


@dataclass(frozen=True)
class Kind:
    """What a fault befalls, and how long it may last. Faults of one part never overlap.

    rest_seconds   how long its part is left alone afterwards
    """

    part: str
    shortest_seconds: float = 0.0
    longest_seconds: float = 0.0
    # Two of them at the same time would be one.
    rest_seconds: float = 0.5


@dataclass(frozen=True)
class Fault:
    """One fault. `dice`, 0 to 1, decides whatever else there is to choose, such as which worker."""

    at: float
    kind: str
    seconds: float
    dice: float

    @property
    def ends_at(self) -> float:
        return self.at + self.seconds

    def __str__(self) -> str:
        return f"{self.at:6.2f} s  {self.kind:<32} for {self.seconds:4.2f} s  dice {self.dice:.2f}"

    def as_json(self) -> dict[str, object]:
        return asdict(self)


KINDS: Mapping[str, Kind] = {
    # Processes
    "relay_leader_killed": Kind("relay"),
    "relay_standby_killed": Kind("relay"),
    "relay_leader_terminated": Kind("relay"),
    "relay_leader_frozen": Kind("relay", 2, 5),
    "relay_leader_frozen_and_deposed": Kind("relay", 2, 5),
    "worker_killed": Kind("workers"),
    "worker_frozen": Kind("workers", 2, 14),
    "workers_master_killed": Kind("workers"),
    "workers_terminated": Kind("workers"),
    "writer_killed": Kind("writers"),
    "writer_frozen": Kind("writers", 1, 4),
    # Postgres
    "postgres_restarted": Kind("postgres", 0, 3),
    "postgres_crashed": Kind("postgres", 0, 3),
    "postgres_killed": Kind("postgres", 0, 3),
    "postgres_backend_killed": Kind("postgres"),
    "postgres_backends_terminated": Kind("postgres"),
    "postgres_read_only": Kind("postgres", 1, 3),
    # Postgres goes back in time, and then some time passes that the next one leaves as it was
    "postgres_failed_over": Kind("postgres", 1.5, 3, 3),
    "postgres_snapshot_restored": Kind("postgres", 1.5, 3, 3),
    "postgres_crashed_asynchronously": Kind("postgres", 1, 3, 3),
    # Redis
    "redis_restarted": Kind("redis", 0, 3),
    "redis_killed": Kind("redis", 0, 3),
    "redis_back_empty": Kind("redis", 0, 2),
    "redis_back_a_second_short": Kind("redis", 0, 1),
    "redis_flushed": Kind("redis"),
    "redis_full": Kind("redis", 1, 3),
    "redis_paused": Kind("redis", 1, 3),
    "redis_password_changed": Kind("redis", 1, 3),
    # Network; each role reaches each server through a proxy of its own
    **{
        f"{role}_to_{server}_{trouble}": Kind(f"{role} to {server}", *duration)
        for role, server in (
            ("relay", "postgres"),
            ("relay", "redis"),
            ("workers", "postgres"),
            ("workers", "redis"),
            ("writers", "postgres"),
        )
        for trouble, duration in {"delayed": (1, 4), "cut": (0, 2), "black_holed": (1, 8)}.items()
    },
    **{f"{role}_commit_replies_lost": Kind(f"{role} to postgres", 1, 2) for role in ("relay", "workers", "writers")},
    # Clocks
    **{f"{role}_clock_skewed": Kind(f"clock of {role}", 3, 12) for role in ("relay", "workers", "writers")},
}


def schedule(seed: int, seconds: float, pause_seconds: float = 1.4, only: Collection[str] = KINDS) -> list[Fault]:
    """Return the faults of a run in the order they begin; all of them have ended after `seconds`.

    `pause_seconds` is the mean time from the beginning of one fault to that of the next, unless they wait for each
    other. `only` are the kinds to choose from.
    """
    chance = random.Random(seed)
    kinds = _bags(chance, [kind for kind in KINDS if kind in only])
    free_at: dict[str, float] = {}
    faults = []
    now = _QUICKEST_START_SECONDS
    while now < seconds:
        name = next(kinds)
        kind = KINDS[name]
        at = max(now, free_at.get(kind.part, 0.0))
        lasts = chance.uniform(kind.shortest_seconds, kind.longest_seconds)
        fault = Fault(round(at, 3), name, round(lasts, 3), round(chance.random(), 3))
        if fault.ends_at <= seconds:
            faults.append(fault)
            free_at[kind.part] = fault.ends_at + kind.rest_seconds
        now += pause_seconds * chance.uniform(0.2, 1.8)
    return sorted(faults, key=lambda fault: fault.at)


def _bags(chance: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    while True:
        bag = list(kinds)
        chance.shuffle(bag)
        yield from bag
