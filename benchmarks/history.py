"""Does the past cost anything? `relay` again over millions of old events, and under an old foreign snapshot."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from statistics import median

import psycopg

from benchmarks.harness import Options, Scene, Stage
from benchmarks.report import Report
from benchmarks.throughput import relayed

# Old weeks have partitions of their own, as if the system had run all the time. Last week's exists already.
_OLD_WEEKS = range(2, 7)
_MONDAY = "date_trunc('week', now() at time zone 'UTC') at time zone 'UTC' - make_interval(weeks => %(week)s::int)"
_BORDER = f"select dovecote.uuid_v7_lower_bound({_MONDAY})"
_FILL = f"""
    insert into dovecote.outbox_of_that_week
        (id, aggregate_type, aggregate_id, event_type, payload, headers, created_at)
    select overlay(dovecote.uuid_v7()::text
                   placing left(dovecote.uuid_v7_lower_bound(occurred)::text, 13) from 1 for 13)::uuid,
           'price', 's' || n %% 1000, 'pricing.price_quoted.v1',
           jsonb_build_object('symbol', 's' || n %% 1000, 'price', '1.25', 'as_of', occurred, 'occurred_at', occurred,
                              'remark', repeat('x', 130)),
           '{{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}}', occurred
    from generate_series(1, %(rows)s) n
    cross join lateral (select {_MONDAY} + make_interval(secs => n * 600000.0 / %(rows)s) as occurred) m
"""  # noqa: S608 - our own words


def history(stage: Stage, options: Options) -> Report:
    """Events a second without a past (`limit`), and with one (`ours`, the worse of the two cases)."""
    events = options.size(100_000, 30_000)
    old = 100_000 if options.quick else 5_000_000
    found: dict[str, list[float]] = {"empty": [], "old_events": [], "old_snapshot": []}
    with stage.scene() as full:
        _fill(full, old)
        for number in options.repeat(quick=2):
            for name in found:
                with stage.scene() if name != "old_events" else nullcontext(full) as scene:
                    with held_snapshot(scene) if name == "old_snapshot" else nullcontext():
                        found[name].append(events / relayed(scene, events))
                    scene.stop_processes()
            options.say(f"round {number + 1}: " + ", ".join(f"{key} {value[-1]:,.0f}" for key, value in found.items()))
        dead = full.dead_tuples()
    worse = min(("old_events", "old_snapshot"), key=lambda name: median(found[name]))
    kept = {name: round(median(found[name]) / median(found["empty"]), 3) for name in ("old_events", "old_snapshot")}
    return Report(
        name="history",
        unit="events/s",
        reach="at least 0.9 of the empty case with old events and with an old snapshot",
        rounds={"ours": found[worse], "limit": found["empty"], **found},
        reached=min(kept.values()) >= 0.9,
        details={"of_the_empty_case": kept, "old_events": old, "events": events, "n_dead_tup": dead},
    )


def _fill(scene: Scene, old: int) -> None:
    """Put old events in place: filled first, indexed and attached then, as five million must not take an hour."""
    connection = scene.connection
    for week in _OLD_WEEKS:
        first, end = (_one(scene, _BORDER, number) for number in (week, week - 1))
        table = f"outbox_old_{week}"
        connection.execute(
            f"create table dovecote.{table} (like dovecote.outbox including defaults including constraints)"
        )
        connection.execute(_FILL.replace("outbox_of_that_week", table), {"rows": old // len(_OLD_WEEKS), "week": week})
        # Attaching makes the indexes of the parent.
        connection.execute(
            f"alter table dovecote.outbox attach partition dovecote.{table} for values from ('{first}') to ('{end}')"
        )
    # The relay read all of it long ago, and its handlers came after it.
    last = scene.one("select last_value from dovecote.outbox_position")
    connection.execute("update dovecote.relay_state set checkpoint = %s", (last,))
    connection.execute("vacuum analyze dovecote.outbox")
    # Long ago: none of it is still on its way to the disk. A given login may lack the right.
    with suppress(psycopg.errors.InsufficientPrivilege):
        connection.execute("checkpoint")


def _one(scene: Scene, query: str, week: int) -> object:
    row = scene.connection.execute(query, {"week": week}).fetchone()
    assert row is not None
    return row[0]


@contextmanager
def held_snapshot(scene: Scene) -> Iterator[None]:
    """Hold a REPEATABLE READ transaction with an xid, as a forgotten session does."""
    with psycopg.connect(scene.database_url) as foreign:
        foreign.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        foreign.execute("create temp table mine (n int)")
        foreign.execute("select count(*) from dovecote.outbox")
        yield
        foreign.rollback()
