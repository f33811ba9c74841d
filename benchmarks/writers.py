"""What an event costs the writer: a domain row only, with an outbox row, with the announcement and the wake-up.

Eight connections, as fast as they can. Measured twice. `service`: processes that write as our guide shows, which
is what a user pays and what is judged. `bare`: pgbench, whose own work is next to nothing, so that nothing
hides what Postgres does. `plain` is our outbox with all its checks, but without the trigger `announce`.

The variants alternate in many short rounds on databases that differ in nothing else, and neighbours in time
are compared: a machine shared with others is noisy.
"""

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median

from benchmarks import naive, pgbench
from benchmarks.harness import Options, Stage
from benchmarks.report import Report
from benchmarks.scene import Scene
from benchmarks.service import Service

Measured = dict[str, list[float]]
_VARIANTS = ("limit", "naive", "plain", "ours")
_WRITES_TO = {"limit": "nothing", "naive": "naive", "plain": "outbox", "ours": "outbox"}


def writers(stage: Stage, options: Options) -> Report:
    """Transactions a second; `naive` is the naive outbox, `limit` the domain row alone."""
    rounds = options.rounds or (3 if options.quick else 9)
    seconds = 1.0 if options.quick else 2.0
    with ExitStack() as stack:
        scenes = {name: stack.enter_context(stage.scene()) for name in _VARIANTS}
        scenes["plain"].connection.execute("alter table dovecote.outbox disable trigger announce")
        scenes["naive"].connection.execute(naive.SCHEMA)
        bare = _alternating(lambda name: _bare(scenes[name], name, seconds), rounds)
        service = Service({name: (scenes[name].database_url, _WRITES_TO[name]) for name in _VARIANTS})
        stack.callback(service.close)
        served = _alternating(lambda name: service.write(name, seconds), rounds)
    trigger, whole = _costs(served, "ours", "plain"), _costs(served, "ours", "limit")
    return Report(
        name="writers",
        unit="transactions/s",
        reach="the trigger costs at most 7 % of plain outbox, the whole at most 30 % of domain only",
        rounds={name: served[name] for name in ("ours", "naive", "limit", "plain")},
        reached=trigger <= 0.07 and whole <= 0.30,
        details={
            "writers": "8 processes with unit_of_work",
            "trigger_costs": trigger,
            "whole_costs": whole,
            "naive_costs": _costs(served, "naive", "limit"),
            "bare": {
                "writers": "pgbench -M prepared" if pgbench.find() else "psycopg",
                "transactions_per_second": {name: round(median(rates), 1) for name, rates in bare.items()},
                "trigger_costs": _costs(bare, "ours", "plain"),
                "whole_costs": _costs(bare, "ours", "limit"),
                "naive_costs": _costs(bare, "naive", "limit"),
            },
        },
    )


def _bare(scene: Scene, name: str, seconds: float) -> float:
    tables = {"naive": "naive.outbox", "plain": "dovecote.outbox", "ours": "dovecote.outbox"}
    script = pgbench.with_event(tables[name]) if name in tables else pgbench.domain_only()
    return pgbench.write(scene, script, seconds).per_second


def _alternating(write: Callable[[str], float], rounds: int) -> Measured:
    measured: Measured = {name: [] for name in _VARIANTS}
    for name in _VARIANTS:
        write(name)  # plans, pages and pools are warm from here on
    for number in range(rounds):
        # Every other round the other way round, so that nobody always comes after the same one.
        for name in _VARIANTS if number % 2 else reversed(_VARIANTS):
            measured[name].append(write(name))
    return measured


def _costs(measured: Measured, of: str, against: str) -> float:
    """Return the share of `against`'s rate that `of` loses, round by round."""
    return round(1 - median(one / other for one, other in zip(measured[of], measured[against], strict=True)), 3)
