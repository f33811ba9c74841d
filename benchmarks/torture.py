"""Does an event at 500/s notice what others hold? A snapshot, an open bulk insert, gaps, waiting rows.

All of it happens to the same processes, one after the other, and is compared with the quiet case that came first.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median

import psycopg

from benchmarks import latency, probe, seeding
from benchmarks.harness import Options, Scene, Stage
from benchmarks.history import held_snapshot
from benchmarks.report import Report, percentile
from dovecote.store import published_batches, relay_state

RATE = 500
_AT_MOST = 1.2
# What a relay at 500/s leaves in ten minutes: a record each 30 ms or so, and a checkpoint a second.
_RECORDS, _CHECKPOINTS = 20_000, 600

_INSERT = "insert into dovecote.outbox (aggregate_type, aggregate_id, event_type, payload)"
_BULK = f"{_INSERT} select 'bulk', 'b' || n, 'bench.bulk_loaded.v1', '{{}}' from generate_series(1, %s) n"  # noqa: S608 - our own words
_FILLER = f"{_INSERT} values ('filler', 'f', 'bench.filled_in.v1', '{{}}')"
_GAPS = f"do $$ begin for n in 1 .. $gaps loop {_FILLER}; rollback; {_FILLER}; commit; end loop; end $$"
# Everything so far is published, and waits behind the first event of its aggregate, which is dead.
_PUBLISHED = """
    insert into dovecote.published_batches (positions, events, epoch)
    select int8multirange(int8range(min(position), max(position), '[]')), count(*), 0 from dovecote.outbox;
    update dovecote.relay_state set checkpoint = (select max(position) from dovecote.outbox)
"""
_WAITING = """
    insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id, event_type, state)
    select 'billing.write_history', id, position, aggregate_type, aggregate_id, event_type,
           case when position = min(position) over (partition by aggregate_id) then 'dead' else 'waiting' end
    from dovecote.outbox where event_type like 'billing.%'
"""

Measured = dict[str, float]


def torture(stage: Stage, options: Options) -> Report:
    """How many times the quiet case's p50 or p99 the worst of the others has."""
    rounds = [_round(stage, options, number) for number in options.repeat()]
    ratios = {
        name: {
            kind: round(median(one[name][kind] / one["quiet"][kind] for one in rounds), 2) for kind in ("p50", "p99")
        }
        for name in rounds[0]
    }
    worst = [max(one[name][kind] / one["quiet"][kind] for name in one for kind in ("p50", "p99")) for one in rounds]
    return Report(
        name="torture",
        unit="times the quiet case",
        reach=f"p50 and p99 of each at most {_AT_MOST} times the quiet ones, by the median of the rounds",
        rounds={"ours": worst},
        reached=all(ratio <= _AT_MOST for each in ratios.values() for ratio in each.values()),
        less_is_better=True,
        details={
            "ratios": ratios,
            **{f"ms_{name}": {kind: median(one[name][kind] for one in rounds) for kind in measured}
               for name, measured in rounds[0].items()},
        },
    )  # fmt: skip


def _round(stage: Stage, options: Options, number: int) -> dict[str, Measured]:
    seconds = 3.5 if options.quick else 30.0
    with stage.scene() as scene, stage.scene() as waiting:
        # A database of its own: what waits is there before the relay is, as after a weekend.
        found = _in_one(scene, seconds, _burdens(scene, options))
        scene.stop_processes()
        _let_wait(waiting, options.size(100_000, 20_000))
        found |= _in_one(waiting, seconds, {"waiting_rows": nullcontext})
    options.say(f"round {number + 1}: {found}")
    return found


def _burdens(scene: Scene, options: Options) -> Mapping[str, Callable[[], AbstractContextManager[None]]]:
    return {
        "quiet": nullcontext,
        "held_snapshot": lambda: _held_snapshot(scene, options),
        "open_bulk_insert": lambda: _bulk_insert(scene, options.size(300_000, 60_000)),
        "gaps": lambda: _gaps(scene, options.size(20_000, 10_000)),
    }


def _in_one(
    scene: Scene, seconds: float, burdens: Mapping[str, Callable[[], AbstractContextManager[None]]]
) -> dict[str, Measured]:
    """Measure under each burden in turn, with the same processes."""
    file = scene.directory / "probe"
    scene.start_consumers("benchmarks.probe:ours", more={"BENCH_PROBE": str(file)})
    scene.start_relay()
    latency.write(scene, RATE, 1.5, "dovecote.outbox")  # connections, plans and caches are warm from here on
    found = {}
    for name, burden in burdens.items():
        with burden():
            _until_published(scene)
            found[name] = _measured(scene, seconds)
    return found


def _measured(scene: Scene, seconds: float) -> Measured:
    """Return milliseconds from commit to the handler's first line."""
    file = scene.directory / "probe"
    committed = latency.write(scene, RATE, seconds, "dovecote.outbox")
    scene.until(lambda: committed.keys() <= probe.notes(file).keys(), 60, "all are handled", every=0.3)
    reached = probe.notes(file)
    waits = [(reached[id] - at) / 1e6 for id, at in committed.items()]
    return {
        "p50": round(percentile(waits, 0.5), 2),
        "p99": round(percentile(waits, 0.99), 2),
        "max": round(max(waits), 1),
    }


def _until_published(scene: Scene) -> None:
    """Wait until the burden itself is no work any more."""
    newest = scene.one("select max(position) from dovecote.outbox")
    published = "select exists (select from dovecote.published_batches where positions @> %s::bigint)"
    scene.until(lambda: scene.one(published, newest), 60, "what is committed is published", every=0.1)


@contextmanager
def _held_snapshot(scene: Scene, options: Options) -> Iterator[None]:
    with held_snapshot(scene):
        if options.quick:
            _age(scene)
        else:
            latency.write(scene, RATE, 570, "dovecote.outbox")
        yield


def _age(scene: Scene) -> None:
    """Leave behind what the relay's own statements would have in ten minutes, each in a transaction of its own."""
    epoch = scene.one("select epoch from dovecote.relay_state")
    words = psycopg.ClientCursor(scene.connection)
    record = words.mogrify(published_batches.RECORD, {"positions": "{}", "events": 0, "epoch": epoch})
    checkpoint = words.mogrify(relay_state.RECORD_CHECKPOINT, (0, epoch))
    scene.connection.execute("set synchronous_commit = off")  # as the relay has it
    for times, statement in ((_RECORDS, record), (_CHECKPOINTS, checkpoint)):
        loop = f"do $$ begin for n in 1 .. {times} loop {statement}; commit; end loop; end $$"
        scene.connection.execute(loop.encode())
    scene.connection.execute("reset synchronous_commit")


@contextmanager
def _bulk_insert(scene: Scene, rows: int) -> Iterator[None]:
    with psycopg.connect(scene.database_url) as bulk:
        bulk.execute(_BULK, (rows,))
        yield
        bulk.rollback()


@contextmanager
def _gaps(scene: Scene, gaps: int) -> Iterator[None]:
    """Roll back so many writers beside one that is held, so that none of their positions is settled."""
    with psycopg.connect(scene.database_url) as held:
        held.execute(_FILLER)
        scene.connection.execute(_GAPS.replace("$gaps", str(gaps)).encode())
        yield
        held.rollback()


def _let_wait(scene: Scene, rows: int) -> None:
    seeding.outbox(scene, rows, seeding.PAYMENTS)
    scene.connection.execute(_PUBLISHED)
    scene.connection.execute(_WAITING)
    scene.connection.execute("vacuum analyze dovecote.outbox")
    scene.connection.execute("vacuum analyze dovecote.deliveries")
