"""Who they are, what they need, how each is written to and how each is started at its best.

What favours them: only the naive outbox and the consumers behind txoutbox keep a table of what was done;
the others would act twice on a repeat.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks import naive
from benchmarks.offered import EVENTS, OUTBOX
from benchmarks.scene import Scene
from benchmarks.seeding import QUOTES

#: The file in which handlers note when they were reached.
PROBE = "probe"
# Both polls of the naive outbox, and Dramatiq's, as low as anybody would have them in production.
_POLLS = {"NAIVE_POLL_SECONDS": "0.02", "dramatiq_worker_timeout": "20"}


@dataclass(frozen=True)
class Peer:
    """One way to do it.

    needs       modules that must be installed
    schema      makes its tables; they must be there before anything starts
    relay       starts what moves rows to queues; None where there is no such hop
    everything  starts all that leads to effects, with handlers noting in the scene's probe
    seed        SQL that writes %s events in one transaction, None where only a program can
    insert      SQL for the events of one transaction (benchmarks.offered); None as above
    published   SQL that is true once the relay has nothing left
    share       of the events that we are given, so that a round ends in time
    """

    name: str
    needs: tuple[str, ...]
    schema: Callable[[Scene], object]
    relay: Callable[[Scene], object] | None
    everything: Callable[[Scene], object]
    seed: str | None
    insert: str | None
    published: str | None = None
    share: float = 0.2

    @property
    def missing(self) -> list[str]:
        return [module for module in self.needs if find_spec(module) is None]


def _probe(scene: Scene) -> dict[str, str]:
    return {"BENCH_PROBE": str(scene.directory / PROBE)}


def _program(scene: Scene, module: str, *arguments: str, application: str, processes: int = 1, **more: str) -> None:
    """Start a peer's own program and return once it has connected to Postgres."""
    for number in range(processes):
        scene.start(f"{application}-{number}", [f"benchmarks.peers.{module}", *arguments], **more)
    connected = "select count(distinct client_port) >= %s from pg_stat_activity where application_name = %s"
    connected += " and datname = current_database()"
    scene.until(lambda: scene.one(connected, processes, application), 60, f"{application} has connected")


# Ours and the naive one ----------------------------------------------------------------------------


def _ours(scene: Scene) -> None:
    scene.start_consumers("benchmarks.probe:ours", more=_probe(scene))
    scene.start_relay()


def _naive(scene: Scene) -> None:
    scene.start_consumers("benchmarks.probe:naive", processes=2, threads=4, more={**_probe(scene), **_POLLS})
    scene.start_naive_relay(**_POLLS)


_SELECT = "select aggregate_type, aggregate_id, event_type, payload::jsonb, headers::jsonb"
_COLUMNS = "(aggregate_type, aggregate_id, event_type, payload, headers)"

# txoutbox ------------------------------------------------------------------------------------------


def _txoutbox_schema(scene: Scene) -> None:
    from txoutbox.adapters.postgres import PostgresStorage

    storage = PostgresStorage(None, schema="txoutbox", notify_channel="txoutbox")
    scene.connection.execute("create schema txoutbox")
    for statement in storage.schema_sql(), naive.SCHEMA:
        scene.connection.execute(statement.encode())


def _txoutbox_relay(scene: Scene) -> None:
    _program(scene, "txoutbox_relay", application="txoutbox")


def _txoutbox(scene: Scene) -> None:
    scene.start_consumers("benchmarks.probe:naive", processes=2, threads=4, more={**_probe(scene), **_POLLS})
    _txoutbox_relay(scene)


_BODY = """convert_to('{"event_id": "' || %s || '", "data": ' || payload || '}', 'utf8')"""
_TXOUTBOX = "insert into txoutbox.outbox (topic, payload, headers) select 'quotes',"

# faststream-outbox ---------------------------------------------------------------------------------


def _faststream_schema(scene: Scene) -> None:
    from faststream_outbox import make_outbox_table
    from sqlalchemy import MetaData, create_engine, make_url

    metadata = MetaData()
    make_outbox_table(metadata, table_name="faststream_rows")
    engine = create_engine(make_url(scene.database_url).set(drivername="postgresql+psycopg"))
    metadata.create_all(engine)
    engine.dispose()


def _faststream(what: str, processes: int) -> Callable[[Scene], None]:
    def start(scene: Scene) -> None:
        _program(scene, "faststream_app", what, application="faststream-outbox", processes=processes, **_probe(scene))

    return start


_FASTSTREAM = "insert into faststream_rows (queue, payload, headers) select 'quotes',"
_FASTSTREAM_HEADERS = """jsonb_build_object('content-type', 'application/json', 'traceparent', {0})"""

# procrastinate -------------------------------------------------------------------------------------


def _procrastinate_schema(scene: Scene) -> None:
    from procrastinate.schema import SchemaManager

    scene.connection.execute(SchemaManager.get_schema().encode())


def _procrastinate(scene: Scene) -> None:
    _program(scene, "procrastinate_app", application="procrastinate", processes=2, **_probe(scene))


_PROCRASTINATE = "insert into procrastinate_jobs (queue_name, task_name, args) select 'quotes', 'apply_quote',"
_ARGUMENTS = "jsonb_build_object('event_id', {0}, 'data', payload::jsonb)"

# Dramatiq alone ------------------------------------------------------------------------------------


def _raw(scene: Scene) -> None:
    scene.start_consumers(
        "benchmarks.peers.raw_dramatiq:broker",
        queues="raw",
        processes=2,
        threads=4,
        more={**_probe(scene), **_POLLS},
    )


PEERS = (
    Peer(
        name="ours",
        needs=(),
        schema=lambda scene: None,
        relay=lambda scene: scene.start_relay(),
        everything=_ours,
        seed=f"insert into dovecote.outbox {_COLUMNS} {_SELECT} from ({QUOTES.events}) e",
        insert=OUTBOX,
        published="select coalesce(sum(events), 0) = (select count(*) from dovecote.outbox)"
        " from dovecote.published_batches",
        share=1.0,
    ),
    Peer(
        name="naive",
        needs=(),
        schema=lambda scene: scene.connection.execute(naive.SCHEMA),
        relay=lambda scene: scene.start_naive_relay(**_POLLS),
        everything=_naive,
        seed=f"insert into naive.outbox {_COLUMNS} {_SELECT} from ({QUOTES.events}) e",
        insert=OUTBOX.replace("dovecote.outbox", "naive.outbox"),
        published="select not exists (select from naive.outbox where processed_at is null)",
    ),
    Peer(
        name="txoutbox",
        needs=("txoutbox", "asyncpg"),
        schema=_txoutbox_schema,
        relay=_txoutbox_relay,
        everything=_txoutbox,
        seed=f"{_TXOUTBOX} {_BODY % 'gen_random_uuid()'}, headers::jsonb from ({QUOTES.events}) e",
        insert=f"{_TXOUTBOX} {_BODY % 'id'}, jsonb_build_object('traceparent', traceparent) {EVENTS}",
        published="select not exists (select from txoutbox.outbox where status = 'pending')",
    ),
    Peer(
        name="faststream-outbox",
        needs=("faststream_outbox", "asyncpg", "faststream"),
        schema=_faststream_schema,
        relay=_faststream("relay", 1),
        everything=_faststream("inplace", 2),
        seed=f"with written as ({_FASTSTREAM} {_BODY % 'gen_random_uuid()'},"
        f' headers::jsonb || \'{{"content-type": "application/json"}}\' from ({QUOTES.events}) e)'
        " select pg_notify('outbox_faststream_rows', 'quotes')",
        insert=f"{_FASTSTREAM} {_BODY % 'id'}, {_FASTSTREAM_HEADERS.format('traceparent')} {EVENTS}"
        " returning pg_notify('outbox_faststream_rows', 'quotes')",
        published="select not exists (select from faststream_rows)",
    ),
    Peer(
        name="procrastinate",
        needs=("procrastinate", "psycopg_pool"),
        schema=_procrastinate_schema,
        relay=None,
        everything=_procrastinate,
        seed=f"{_PROCRASTINATE} {_ARGUMENTS.format('gen_random_uuid()')} from ({QUOTES.events}) e",
        insert=f"{_PROCRASTINATE} {_ARGUMENTS.format('id')} {EVENTS}",
        share=0.1,
    ),
    Peer(
        name="dramatiq",
        needs=(),
        schema=lambda scene: None,
        relay=None,
        everything=_raw,
        seed=None,
        insert=None,
    ),
)
