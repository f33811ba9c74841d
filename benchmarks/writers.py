"""What an event costs the service that writes it: a domain row only, with an outbox row, with floors and bell.

Eight connections, as fast as they can. The variants alternate in many short rounds on databases that differ
in nothing else, and neighbours in time are compared: a machine shared with others is noisy. `plain` is our
outbox with all its checks, but without the trigger `announce`.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from statistics import median

from benchmarks import pgbench
from benchmarks.harness import Options, Scene, Stage
from benchmarks.report import Report

_OUTBOX = "dovecote.outbox"


def writers(stage: Stage, options: Options) -> Report:
    """Transactions a second; `naive` is the naive outbox, `limit` the domain row alone."""
    from benchmarks import naive

    rounds = options.rounds or (4 if options.quick else 12)
    with ExitStack() as stack:
        scenes = {name: stack.enter_context(stage.scene()) for name in ("limit", "plain", "ours", "naive")}
        scenes["plain"].connection.execute("alter table dovecote.outbox disable trigger announce")
        scenes["naive"].connection.execute(naive.SCHEMA)
        scripts = {name: pgbench.with_event(_OUTBOX) for name in ("plain", "ours")}
        scripts |= {"limit": pgbench.domain_only(), "naive": pgbench.with_event("naive.outbox")}
        measured = _alternating(scenes, scripts, rounds)
    middle = {name: median(values) for name, values in measured.items()}
    trigger = 1 - median(ours / plain for ours, plain in zip(measured["ours"], measured["plain"], strict=True))
    whole = 1 - median(ours / domain for ours, domain in zip(measured["ours"], measured["limit"], strict=True))
    return Report(
        name="writers",
        unit="transactions/s",
        reach="the trigger costs at most 7 % of plain outbox, the whole at most 30 % of domain only",
        rounds={name: measured[name] for name in ("ours", "naive", "limit", "plain")},
        reached=trigger <= 0.07 and whole <= 0.30,
        details={
            "plain_outbox": round(middle["plain"], 1),
            "trigger_costs": round(trigger, 3),
            "whole_costs": round(whole, 3),
            "writers": "pgbench -M prepared" if pgbench.find() else "psycopg",
        },
    )


def _alternating(scenes: Mapping[str, Scene], scripts: Mapping[str, str], rounds: int) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {name: [] for name in scenes}
    for name, scene in scenes.items():
        pgbench.write(scene, scripts[name], 1)
    for number in range(rounds):
        # Every other round backwards, so that nobody always comes after the same one.
        for name in sorted(scenes, reverse=bool(number % 2)):
            measured[name].append(pgbench.write(scenes[name], scripts[name], 2).per_second)
    return measured
