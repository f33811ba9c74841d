"""Weekly partitions: made ahead, and dropped when they are old and nothing needs them any more.

What holds a week back is decided in SQL, `dovecote.partition_blockers`, and `dovecote.drop_partition` asks it again
under lock: no caller can drop what is still needed. docs/adr/0011-dropping-weekly-partitions.md says how and why.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Engine, TextClause, text

from dovecote.errors import DovecoteError
from dovecote.operations import archive
from dovecote.operations.deliveries import HANDLERS
from dovecote.operations.snapshot import snapshot
from dovecote.operations.validation import WrongRequest, changing, require_who_and_why
from dovecote.route import Route

_BATCH_ROWS = 10_000
# Rows looked at for one count of the listing; `maintain` counts them all.
_MAX_COUNTED = 1_000


class Archived(DovecoteError):
    """What was asked for has been dropped; the message names the archives."""


@dataclass(frozen=True)
class PartitionBlocker:
    """Why a week cannot go yet.

    what     unpublished, unprocessed, unknown version, retrying, waiting, dead, replay
    events   a lower bound where `at_least` says so
    example  the least event id concerned; of a replay, its own id
    """

    handler: str | None
    what: str
    events: int
    example: UUID
    advice: str
    at_least: bool = False


@dataclass(frozen=True)
class DroppedWeek:
    week: str
    events: int
    archive: str | None
    checksum: str | None


@dataclass(frozen=True)
class HeldWeek:
    week: str
    blockers: Sequence[PartitionBlocker]


@dataclass(frozen=True)
class Maintenance:
    """What one run did, or would do.

    made     weeks whose partitions were new
    moved    rows that lay in a default partition and are in their week's now
    dropped  weeks that are gone; in a dry run, those that could be
    held     old weeks that something still needs
    """

    dry_run: bool
    keep_weeks: int
    made: int
    moved: int
    dropped: Sequence[DroppedWeek] = field(default=())
    held: Sequence[HeldWeek] = field(default=())


@dataclass(frozen=True)
class Week:
    """One week's partitions. Rows are estimates of Postgres' statistics, never counted; bytes are all three tables'.

    blockers  what is seen at a glance: not what no handler has acted on, which takes reading the week
    """

    week: str
    starts_at: datetime
    ends_at: datetime
    events: int
    processed: int
    bytes: int
    is_old: bool
    blockers: Sequence[PartitionBlocker]


@dataclass(frozen=True)
class Partitions:
    """Weeks, and what is beside them.

    headroom_weeks  how many whole weeks after this one have partitions
    misplaced_rows  rows in the default partitions
    """

    weeks: Sequence[Week]
    headroom_weeks: int
    misplaced_rows: int
    dropped: Sequence[dict[str, Any]]


_WEEKS = text(
    """
    select w.week, w.starts_at, w.starts_at + interval '7 days' as ends_at,
           dovecote.uuid_v7_lower_bound(w.starts_at) as lower_id,
           dovecote.uuid_v7_lower_bound(w.starts_at + interval '7 days') as upper_id,
           coalesce((select greatest(c.reltuples, s.n_live_tup, 0) from pg_class c
                     left join pg_stat_all_tables s on s.relid = c.oid
                     where c.oid = to_regclass('dovecote.outbox_' || w.week)), 0)::bigint as events,
           coalesce((select greatest(c.reltuples, s.n_live_tup, 0) from pg_class c
                     left join pg_stat_all_tables s on s.relid = c.oid
                     where c.oid = to_regclass('dovecote.processed_events_' || w.week)), 0)::bigint as processed,
           (coalesce(pg_total_relation_size(to_regclass('dovecote.outbox_' || w.week)), 0)
            + coalesce(pg_total_relation_size(to_regclass('dovecote.processed_events_' || w.week)), 0)
            + coalesce(pg_total_relation_size(to_regclass('dovecote.published_batches_' || w.week)), 0)
           )::bigint as bytes
    from (select substring(c.relname from 8) as week, dovecote.week_monday(substring(c.relname from 8)) as starts_at
          from pg_inherits i join pg_class c on c.oid = i.inhrelid
          where i.inhparent = 'dovecote.outbox'::regclass and c.relname ~ '^outbox_[0-9]{4}w[0-9]{2}$') w
    order by w.starts_at
    """
)
_BLOCKERS = text(
    "select handler_name, blocker, events, example, false as at_least"
    " from dovecote.partition_blockers(:lower_id, :upper_id) order by 1, 2"
)
# What an index answers at once. Whether every handler has acted on every event is not among it.
_AT_A_GLANCE = text(
    f"""
    select null as handler_name, 'unpublished' as blocker, count(*) as events, min(few.id::text)::uuid as example,
           count(*) = :most as at_least
    from (select o.id from dovecote.outbox o
          where o.id >= :lower_id and o.id < :upper_id and o.position > (select checkpoint from dovecote.relay_state)
          order by o.position limit :most) few
    having count(*) > 0
    union all
    select h.name, few.state, count(*), min(few.event_id::text)::uuid, sum(count(*)) over (partition by h.name) = :most
    from ({HANDLERS}) h
    cross join lateral (
        select d.event_id, d.state from dovecote.deliveries d
        where d.handler_name = h.name and d.event_id >= :lower_id and d.event_id < :upper_id and d.state <> 'discarded'
        order by d.event_id limit :most) few
    group by h.name, few.state
    union all
    select r.handler_name, 'replay', count(*), min(r.id::text)::uuid, false
    from dovecote.replays r
    where r.state in ('pending', 'running', 'paused')
      and r.cursor_position < (select o.position from dovecote.outbox o where o.id >= :lower_id and o.id < :upper_id
                               order by o.position desc limit 1)
    group by r.handler_name
    order by 1, 2
    """  # noqa: S608 - put together from constants
)
_SUBSCRIBED = text("select count(*) from dovecote.subscriptions where handler_name = :handler")
_MISPLACED = text(
    """
    select coalesce(sum(greatest(c.reltuples, s.n_live_tup, 0)), 0)::bigint
    from pg_class c left join pg_stat_all_tables s on s.relid = c.oid
    where c.oid in ('dovecote.outbox_default'::regclass, 'dovecote.processed_events_default'::regclass,
                    'dovecote.published_batches_default'::regclass)
    """
)
_DROPPED = text(
    """
    select week, events, first_position, last_position, first_created_at, last_created_at, archive, checksum,
           actor, dropped_at
    from dovecote.dropped_partitions order by lower_id, dropped_at
    """
)
_OVERLAPPING = text(
    """
    select week, archive from dovecote.dropped_partitions
    where events > 0
      and (cast(:since as timestamptz) is null or last_created_at >= :since)
      and (cast(:until as timestamptz) is null or first_created_at < :until)
      and (cast(:after_position as bigint) is null or last_position > :after_position)
      and (cast(:upto_position as bigint) is null or first_position <= :upto_position)
    order by lower_id, dropped_at
    """
)
_IN_WEEK = {
    "outbox": """
        select row_to_json(o)::text from dovecote.outbox o where o.id >= :lower_id and o.id < :upper_id order by o.id
    """,
    "processed_events": """
        select row_to_json(p)::text from dovecote.processed_events p
        where p.event_id >= :lower_id and p.event_id < :upper_id order by p.event_id, p.handler_name
    """,
    "discarded_deliveries": """
        select row_to_json(d)::text from dovecote.deliveries d
        where d.event_id >= :lower_id and d.event_id < :upper_id and d.state = 'discarded'
        order by d.event_id, d.handler_name
    """,
    # Those of its border share it with the week beside.
    "published_batches": """
        select row_to_json(b)::text
        from (select min(o.position) as first, max(o.position) as last from dovecote.outbox o
              where o.id >= :lower_id and o.id < :upper_id) week
        join dovecote.published_batches b on b.positions && int8multirange(int8range(week.first, week.last, '[]'))
        order by b.published_at, b.positions
""",
}


def maintain(
    engine: Engine,
    *,
    actor: str,
    keep_weeks: int,
    archive_dir: Path | None = None,
    weeks_ahead: int = 4,
    dry_run: bool = False,
    routes: Sequence[Route] = (),
) -> Maintenance:
    """Make partitions ahead, move misplaced rows into their weeks, and drop weeks older than `keep_weeks` whole ones.

    `keep_weeks` 0 drops nothing. Each week goes in a transaction of its own, archived first where there is a directory.
    A kill at any point leaves the partition, or a complete archive, or both. A week that something still needs is
    held and named.
    Errors: CannotArchive; DBAPIError with lock_not_available when others hold the tables for long.
    """
    made = moved = 0
    if not dry_run:
        moved = _place_misplaced_rows(engine)
        with engine.begin() as connection:
            made = connection.execute(
                text("select dovecote.ensure_partitions(:ahead)"), {"ahead": weeks_ahead}
            ).scalar_one()
    dropped, held = [], []
    for week in _old_weeks(engine, keep_weeks):
        with _unhurried(engine) as connection, connection.begin():
            if not dry_run:
                connection.execute(text("select dovecote.lock_partition(:week)"), {"week": week.week})
            blockers = _blockers(connection, week, routes)
            if blockers:
                held.append(HeldWeek(week.week, blockers))
            elif dry_run:
                dropped.append(DroppedWeek(week.week, week.events, None, None))
            else:
                dropped.append(_drop(connection, week, actor, archive_dir))
    return Maintenance(dry_run, keep_weeks, made, moved, dropped, held)


def list_partitions(engine: Engine, *, keep_weeks: int, routes: Sequence[Route] = ()) -> Partitions:
    """Return every week that has partitions, and what is seen at a glance to hold those back that are over.

    A dry run of `maintain` finds out exactly, and reads the old weeks for that.
    """
    now = datetime.now(UTC)
    with snapshot(engine) as connection:
        old = {week.week for week in _old(connection, keep_weeks)}
        weeks = [
            Week(
                row.week,
                row.starts_at,
                row.ends_at,
                row.events,
                row.processed,
                row.bytes,
                row.week in old,
                _blockers(connection, row, routes, _AT_A_GLANCE) if row.ends_at <= now else (),
            )
            for row in connection.execute(_WEEKS).all()
        ]
        misplaced = connection.execute(_MISPLACED).scalar_one()
        dropped = [dict(row._mapping) for row in connection.execute(_DROPPED)]
    return Partitions(weeks, sum(1 for week in weeks if week.starts_at > now), misplaced, dropped)


def require_present(
    connection: Connection,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    after_position: int | None = None,
    upto_position: int | None = None,
) -> None:
    """Do nothing if what these bounds ask for is still in the outbox.

    Bounds that are not given reach as far as there are events: without any, everything there is was asked for.
    Errors: Archived naming the weeks that are gone and their archives.
    """
    bounds = {"since": since, "until": until, "after_position": after_position, "upto_position": upto_position}
    if all(bound is None for bound in bounds.values()):
        return
    gone = connection.execute(_OVERLAPPING, bounds).all()
    if gone:
        places = "; ".join(
            f"week {row.week} is in {row.archive}" if row.archive else f"week {row.week} was dropped without an archive"
            for row in gone
        )
        raise Archived(f"events of that range are not in the outbox any more: {places}")


def unsubscribe_handler(
    engine: Engine, handler: str, *, actor: str, routes: Sequence[Route] = (), dry_run: bool = False
) -> int:
    """End the subscriptions of a handler that is gone for good; return how many there were.

    What it has not processed holds no week back any more. What failed in it stays until it is discarded.
    Errors: WrongRequest for a handler that `routes` still have, or that has no subscription.
    """
    require_who_and_why(actor, None)
    if handler in {route.handler for route in routes}:
        raise WrongRequest(f"{handler} has a route: take that out of workers/routes.py before you unsubscribe it")
    with changing(engine, WrongRequest) as connection:
        subscribed: int = connection.execute(_SUBSCRIBED, {"handler": handler}).scalar_one()
        if not subscribed:
            raise WrongRequest(f"no handler {handler!r} has subscriptions")
        if not dry_run:
            connection.execute(
                text("select dovecote.unsubscribe_handler(:handler, :by)"), {"handler": handler, "by": actor}
            )
    return subscribed


# Moving and dropping -----------------------------------------------------------------------------


def _place_misplaced_rows(engine: Engine) -> int:
    copied = 1
    while copied:
        with _unhurried(engine) as connection, connection.begin():
            copied = connection.execute(
                text("select dovecote.copy_misplaced_rows(:most)"), {"most": _BATCH_ROWS}
            ).scalar_one()
    with _unhurried(engine) as connection, connection.begin():
        moved: int = connection.execute(text("select dovecote.place_misplaced_rows()")).scalar_one()
    return moved


def _drop(connection: Connection, week: Any, actor: str, archive_dir: Path | None) -> DroppedWeek:
    """Drop a week that this transaction holds."""
    packed = _archive(connection, week, archive_dir) if archive_dir else None
    gone = connection.execute(
        text("select * from dovecote.drop_partition(:week, :by, :archive, :checksum, :events, :processed)"),
        {
            "week": week.week,
            "by": actor,
            "archive": str(packed.path.absolute()) if packed else None,
            "checksum": packed.checksum if packed else None,
            "events": packed.rows["outbox"] if packed else None,
            "processed": packed.rows["processed_events"] if packed else None,
        },
    ).one()
    return DroppedWeek(gone.week, gone.events, gone.archive, gone.checksum)


def _archive(connection: Connection, week: Any, directory: Path) -> archive.Archive:
    bounds = {"lower_id": week.lower_id, "upper_id": week.upper_id}

    def lines(query: str) -> Iterator[str]:
        statement = text(query).execution_options(stream_results=True, max_row_buffer=1_000)
        with connection.execute(statement, bounds) as found:
            yield from found.scalars()

    about = {"week": week.week, "starts_at": week.starts_at.isoformat(), "ends_at": week.ends_at.isoformat()}
    # The database's name keeps apart what two systems have begun in one directory.
    database = connection.execute(text("select current_database()")).scalar_one()
    name = f"{week.week}-{database}"
    return archive.write(directory, name, about, {table: lines(query) for table, query in _IN_WEEK.items()})


# Looking -----------------------------------------------------------------------------------------


def _old_weeks(engine: Engine, keep_weeks: int) -> list[Any]:
    if keep_weeks == 0:
        return []
    with engine.connect() as connection:
        return _old(connection, keep_weeks)


def _old(connection: Connection, keep_weeks: int) -> list[Any]:
    """Return the weeks before the `keep_weeks` whole ones before this one, oldest first."""
    now = connection.execute(text("select now()")).scalar_one()
    monday = (now - timedelta(days=now.weekday())).replace(hour=0, minute=0, second=0, microsecond=0)
    border = monday - timedelta(weeks=keep_weeks)
    return [week for week in connection.execute(_WEEKS) if keep_weeks and week.starts_at < border]


def _blockers(
    connection: Connection, week: Any, routes: Sequence[Route], query: TextClause = _BLOCKERS
) -> list[PartitionBlocker]:
    bounds = {"lower_id": week.lower_id, "upper_id": week.upper_id}
    more = {} if query is _BLOCKERS else {"handler": None, "most": _MAX_COUNTED}
    return [
        PartitionBlocker(
            row.handler_name,
            row.blocker,
            row.events,
            row.example,
            _advice(row.handler_name, row.blocker, routes),
            row.at_least,
        )
        for row in connection.execute(query, {**bounds, **more})
    ]


def _advice(handler: str | None, blocker: str, routes: Sequence[Route]) -> str:
    is_gone = routes and handler not in {route.handler for route in routes}
    if is_gone and blocker in ("unprocessed", "unknown version"):
        return f"no route has this handler: bring it back, or `dovecote maintain --unsubscribe {handler}`"
    match blocker:
        case "unpublished":
            return "let the relay run until it has caught up: see `dovecote status`"
        case "unprocessed":
            return "let the consumers run until they have caught up: see `dovecote status`"
        case "unknown version":
            return "deploy the code that knows the newer version of the event"
        case "retrying":
            return "wait for the retries, or discard them"
        case "waiting":
            return "they wait behind an earlier event of their aggregate: retry or discard that one"
        case "dead":
            return "retry or discard them"
        case _:
            return "wait for the replay to pass the week, or cancel it"


@contextmanager
def _unhurried(engine: Engine) -> Iterator[Connection]:
    """A connection whose statements may take long: a week is large."""
    with engine.connect() as connection:
        connection.execute(text("set statement_timeout = 0"))
        connection.commit()
        try:
            yield connection
        finally:
            connection.rollback()
            connection.execute(text("reset statement_timeout"))
            connection.commit()
