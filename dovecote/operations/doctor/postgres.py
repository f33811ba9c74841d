"""Checks of Postgres, of the schema and of what the relay does there."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import sqlalchemy.exc
from psycopg.rows import namedtuple_row

from dovecote.masking import masked
from dovecote.migrations import schema
from dovecote.operations.doctor import encryption, leftovers, progress, rights, rows
from dovecote.operations.doctor.finding import Finding, Subject, error, ok, skew, warning
from dovecote.store.checks import NOTIFY_QUEUE, OLDEST_WRITER, PARTITIONS
from dovecote.store.connections import ONLY_OUR_NAMES, connect, connection_parameters, hears_notifications
from dovecote.store.loaders import load_anything
from dovecote.store.runs import Run
from dovecote.store.standbys import FLUSHED, blindness

Connection = psycopg.Connection[Any]

_CONNECT_SECONDS = 5
_STATEMENT_MS = 5_000
_HEARD_WITHIN_SECONDS = 3.0
_OLDEST_POSTGRES = 150_000
_LONG_WRITER_SECONDS = 60.0
_SILENT_SECONDS = 10.0
_RECENT_EVENTS = 10_000
# From half of the queue on, nothing of ours notifies (migration 0018).
_MUCH_OF_NOTIFY_QUEUE, _NO_WAKEUPS_FROM = 0.25, 0.5

# A timestamp as text: psycopg reads one DateStyle only, and behind a pool of transactions we set none.
# A frozen relay keeps its lock and asks nothing any more. Who may not see others' statements gets null.
_RELAY = """
    select s.owner, s.epoch, s.history, s.instance, s.stands_back_for,
           to_char(s.owned_since at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS') as owned_since,
           leader.pid, leader.login, leader.silent_seconds
    from dovecote.relay_state s
    left join lateral (
        select pid, login, silent_seconds from dovecote.leader() limit 1
    ) leader on true
"""

# The queue is the cluster's. Who listens is not shown; a listener reads when its transaction ends. The oldest first.
_IN_TRANSACTION = """
    select pid, coalesce(datname, '') as database, coalesce(application_name, '') as application, state,
           extract(epoch from clock_timestamp() - xact_start)::float8 as seconds, left(query, 100) as query
    from pg_stat_activity
    where xact_start is not null and pid <> pg_backend_pid() and backend_type = 'client backend'
    order by xact_start limit 3
"""

# The newest only: reading ten million rows would take too long.
_RECENT_TYPES = """
    select event_type, count(*) as events
    from (select event_type from dovecote.outbox order by position desc limit %s) as recent
    group by 1 order by 1
"""


def findings(subject: Subject) -> list[Finding]:
    """Return the findings of this group; without a connection, that is the only finding."""
    try:
        with session(subject) as connection:
            found = [ok("postgres.reachable", _address(connection)), version(connection), clock(connection, subject)]
            found.append(encryption.postgres(connection))
            found.append(notify_queue(connection))
            found += sessions(subject, connection)
            schema_found = is_migrated(subject)
            found.append(schema_found)
            if schema_found.level == "ok":
                found += [
                    sequence(connection),
                    relay(connection, subject),
                    progress.relay(connection),
                    progress.handlers(connection, subject.routes),
                    writers(connection),
                    rights.foreign(connection),
                    rights.public(connection),
                    rows.replays(connection, subject.routes),
                    rows.batches(connection),
                ]
                found.append(partitions(connection))
                if subject.settings.relay.publish_after == "standby":
                    found.append(standby(connection))
                found += routes(connection, subject)
                found += [leftovers.handlers(connection, subject), leftovers.gone_events(connection)]
                found.append(retention(subject))
            return found
    except psycopg.Error as caught:
        sentence = masked(str(caught).strip().splitlines()[0] if str(caught).strip() else type(caught).__name__)
        advice = (
            "Start Postgres, or mend DATABASE_URL, the network, the password; every process waits for it meanwhile."
        )
        return [error("postgres.reachable", sentence, advice)]


def version(connection: Connection) -> Finding:
    number = connection.info.server_version
    found = f"Postgres {number // 10_000}.{number % 10_000}"
    if number < _OLDEST_POSTGRES:
        return error("postgres.version", found, "Upgrade to Postgres 15 or newer.")
    return ok("postgres.version", found)


def clock(connection: Connection, subject: Subject) -> Finding:
    before = subject.now()
    (there,) = _one(connection, "select extract(epoch from clock_timestamp())::float8")
    return skew("postgres.clock", "Postgres", there - (before + subject.now()) / 2)


def notify_queue(connection: Connection) -> Finding:
    (used,) = _one(connection, NOTIFY_QUEUE)
    found = f"{used:.0%} of the queue of notifications is in use"
    if used < _MUCH_OF_NOTIFY_QUEUE:
        return ok("postgres.notify_queue", found)
    holders = [
        f"pid {row.pid} ({row.application or 'no name'}, database {row.database}, {row.state}) for {row.seconds:.0f} s,"
        f" last statement: {masked(' '.join(row.query.split()))}"
        for row in connection.execute(_IN_TRANSACTION)
    ]
    found += "; in a transaction are " + ("; ".join(holders) or "none that this login may see (pg_read_all_stats)")
    advice = (
        "A session that LISTENs and stays in a transaction keeps all that came since. End it: "
        "`select pg_terminate_backend(pid)`. Until then writers are taken, and from half of the queue on nobody is "
        "woken: the relay finds what was written when it polls."
    )
    return (warning if used < _NO_WAKEUPS_FROM else error)("postgres.notify_queue", found, advice)


def sessions(subject: Subject, connection: Connection) -> list[Finding]:
    """Try what a proxy that pools transactions cannot do."""
    advice = (
        "DATABASE_URL leads through a proxy that pools transactions, such as pgbouncer with pool_mode = transaction: "
        "give the relay a URL that leads to Postgres itself, or a pool_mode = session."
    )
    with session(subject) as another:
        return [_locks(connection, another, advice), _listen(connection, another, advice)]


def _locks(connection: Connection, another: Connection, advice: str) -> Finding:
    key = uuid4().int % 2**31
    # In a pool the second connection is given the session that holds the lock, and may take it once more.
    connection.execute("select pg_advisory_lock(%s)", (key,))
    with another.transaction():
        (taken,) = _one(another, "select pg_try_advisory_lock(%s)", key)
        if taken:
            another.execute("select pg_advisory_unlock_all()")
    if taken:
        return error("postgres.session_locks", "a session lock did not keep another connection out", advice)
    (released,) = _one(connection, "select pg_advisory_unlock(%s)", key)
    if not released:
        return error("postgres.session_locks", "a session lock was gone with the next statement", advice)
    return ok("postgres.session_locks", "a session lock keeps others out")


def _listen(connection: Connection, another: Connection, advice: str) -> Finding:
    try:
        is_heard = hears_notifications(connection, another, _HEARD_WITHIN_SECONDS)
    except psycopg.errors.ProgramLimitExceeded as caught:
        return warning("postgres.listen", f"not tried: {caught}", "See postgres.notify_queue; then try again.")
    if not is_heard:
        return error("postgres.listen", f"a NOTIFY was not heard within {_HEARD_WITHIN_SECONDS:g} s", advice)
    return ok("postgres.listen", "a NOTIFY is heard")


def is_migrated(subject: Subject) -> Finding:
    engine = connect(
        _url(subject),
        connect_timeout_seconds=_CONNECT_SECONDS,
        statement_timeout_ms=_STATEMENT_MS,
        session_settings=ONLY_OUR_NAMES,
    )
    try:
        with engine.connect() as connection:
            missing = schema.pending(connection, locations=subject.migration_locations)
    except ValueError as caught:
        # The revision in the database is none that this version knows.
        return error("postgres.schema", f"the schema is newer than this version ({caught})", "Upgrade Dovecote here.")
    except sqlalchemy.exc.DBAPIError as caught:
        sentence = masked(str(caught.orig).splitlines()[0])
        if "startup parameter" in sentence:
            advice = (
                "The proxy in between refuses our connections: pgbouncer wants ignore_startup_parameters = options."
            )
            return error("postgres.options", sentence, advice)
        return error("postgres.schema", sentence, "Run `dovecote migrate`, as a login that may.")
    finally:
        engine.dispose()
    if missing:
        return error("postgres.schema", f"not applied: {', '.join(missing)}", "Run `dovecote migrate`.")
    return ok("postgres.schema", "up to date")


def relay(connection: Connection, subject: Subject) -> Finding:
    row = connection.execute(_RELAY).fetchone()
    assert row is not None, "relay_state has one row"
    if row.pid is None:
        last = f"; the last was {row.owner}" if row.owner else ""
        return error(
            "relay.alive", f"no relay leads{last}", "Start one: `dovecote relay`; nothing is published meanwhile."
        )
    if row.stands_back_for:
        return error(
            "relay.alive",
            f"the relay stands back: one of {Run.read(row.stands_back_for)} publishes to this Redis",
            "That database is newer. If it is the one to go on with, point DATABASE_URL to it everywhere. If not, stop "
            "its relays: ours leads 10 s later. If both are wanted, give each a Redis or a DOVECOTE_REDIS__NAMESPACE.",
        )
    since = f"{row.owned_since} UTC" if row.owned_since else "just now"
    found = f"{row.owner or 'somebody'} leads since {since}, backend {row.pid}, login {row.login}, epoch {row.epoch}"
    if row.history:
        found += f", history {row.history} of {Run.read(row.instance)}"
    # It asks something each second, or once in its poll.
    longest = _SILENT_SECONDS + 2 * subject.settings.relay.poll_interval_seconds
    if row.silent_seconds is not None and row.silent_seconds > longest:
        return error(
            "relay.alive",
            f"{found}; it has asked nothing for {row.silent_seconds:.0f} s",
            "It or its machine is frozen: end it, or `select pg_terminate_backend(...)`; a standby leads then.",
        )
    return ok("relay.alive", found)


def sequence(connection: Connection) -> Finding:
    (fault,) = _one(connection, "select dovecote.sequence_fault()")
    if fault is None:
        return ok("postgres.sequence", "positions are handed out in order")
    return error(
        "postgres.sequence",
        fault,
        "Run `dovecote recover --dry-run`, which says what it would do, and then `dovecote recover`; no relay leads "
        "before. See docs/operations/backup-and-failover.md.",
    )


def standby(connection: Connection) -> Finding:
    is_flushed, _ = _one(connection, FLUSHED.replace("%(upto)s", "null"))
    if is_flushed is not None:
        return ok("relay.standby", "a standby is seen")
    return error(
        "relay.standby",
        "no standby is seen, and DOVECOTE_RELAY__PUBLISH_AFTER is standby: nothing is published",
        f"Start a standby; if one is there, {blindness(connection) or 'see why it does not stream'}.",
    )


def writers(connection: Connection) -> Finding:
    row = connection.execute(OLDEST_WRITER).fetchone()
    if row is None:
        return ok("relay.writers", "no transaction is writing events")
    application = row.application or "no name"
    who = f"prepared transaction {row.gid!r}" if row.gid else f"pid {row.pid} (login {row.login}, {application})"
    query = f", last statement: {masked(' '.join(row.query.split()))}" if row.query else ""
    found = f"the oldest writer has its low-water mark at {row.low_water_mark}, for {row.seconds:.0f} s: {who}{query}"
    if row.seconds > _LONG_WRITER_SECONDS:
        advice = "The checkpoint waits for this writer; events do not. End its transaction: commit, or " + (
            "`rollback prepared`." if row.gid else f"`select pg_terminate_backend({row.pid})`."
        )
        return warning("relay.writers", found, advice)
    return ok("relay.writers", found)


def partitions(connection: Connection) -> Finding:
    row = connection.execute(PARTITIONS).fetchone()
    assert row is not None
    advice = (
        "The relay makes them once an hour; `select dovecote.ensure_partitions()` does it now and says what hinders."
    )
    if row.defaults:
        return warning("postgres.partitions", f"rows outside of every week, in {row.defaults}", advice)
    found = f"{row.ahead} weeks ahead"
    if row.ahead < 3:
        return (error if row.ahead == 0 else warning)("postgres.partitions", found, advice)
    return ok("postgres.partitions", found)


def routes(connection: Connection, subject: Subject) -> list[Finding]:
    recent = {row.event_type: row.events for row in connection.execute(_RECENT_TYPES, (_RECENT_EVENTS,))}
    wanted = {event_type for route in subject.routes for event_type in route.event_types}
    seen = sum(recent.values())
    unwanted = {event_type: events for event_type, events in recent.items() if event_type not in wanted}
    idle = [route.handler for route in subject.routes if not recent.keys() & set(route.event_types)]
    described = f"of the newest {seen} events"
    if unwanted:
        events = warning(
            "routes.events",
            f"{described} no route wants " + ", ".join(f"{name} ({events})" for name, events in unwanted.items()),
            "Add a Route in workers/routes.py, or have the writer stop; they are kept, and can be replayed later.",
        )
    else:
        events = ok("routes.events", f"each {described} has a route")
    if seen and idle:
        handlers = warning(
            "routes.handlers",
            f"{described} none is for {', '.join(idle)}",
            "As it should be for rare events; else look whether the writer writes them, and under which type.",
        )
    else:
        handlers = ok("routes.handlers", f"each handler has events {described}" if seen else "there are no events yet")
    return [events, handlers]


def retention(subject: Subject) -> Finding:
    """What is dropped from processed_events could be acted on twice by a retry that is still to come."""
    route, longest = max(((route, route.longest_retry) for route in subject.routes), key=lambda pair: pair[1])
    kept = _kept(subject)
    found = f"the longest schedule of retries is {longest} ({route.handler}), dedup is kept {kept or 'for ever'}"
    if kept is not None and kept <= longest:
        return error("retention.dedup", found, "Keep more weeks, or give the route fewer attempts or shorter pauses.")
    return ok("retention.dedup", found)


def _kept(subject: Subject) -> timedelta | None:
    weeks = subject.settings.retention.keep_weeks
    return timedelta(weeks=weeks) if weeks else None


@contextmanager
def session(subject: Subject) -> Iterator[Connection]:
    """Yield a connection of its own for a check."""
    # Set later, where options are refused, they would stay in a pool for the next client. `examine` has a limit of its
    # own, and the login's may be shorter than a check on a busy server takes.
    try:
        connection = _connect(subject, {**ONLY_OUR_NAMES, "statement_timeout": _STATEMENT_MS})
    except psycopg.OperationalError as caught:
        if "startup parameter" not in str(caught):
            raise
        connection = _connect(subject, {})  # a pgbouncer; what it leads to is examined all the same
    with connection:
        load_anything(connection)
        yield connection


def _connect(subject: Subject, settings: Mapping[str, object]) -> Connection:
    parameters = connection_parameters(
        _url(subject),
        settings,
        application_name="dovecote doctor",
        keepalives_idle=2,
        keepalives_interval=1,
        keepalives_count=3,
    )
    parameters["connect_timeout"] = _CONNECT_SECONDS
    return psycopg.connect(autocommit=True, row_factory=namedtuple_row, prepare_threshold=None, **parameters)


def _url(subject: Subject) -> str:
    return subject.settings.database.url.get_secret_value()


def _one(connection: Connection, query: str, *parameters: object) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = connection.execute(query, parameters).fetchone()
    assert row is not None
    return row


def _address(connection: Connection) -> str:
    began = time.monotonic()
    connection.execute("select")
    return f"{connection.info.host}:{connection.info.port}, {(time.monotonic() - began) * 1_000:.1f} ms away"
