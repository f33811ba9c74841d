"""Logins of every role on a database that has something of everything that operators change."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg
from sqlalchemy import make_url

Connection = psycopg.Connection[tuple[Any, ...]]
HANDLER = "test.note"
TYPE = "pricing.price_quoted.v1"
ROLES = ("owner", "writer", "worker", "operator", "viewer", "service")


@dataclass(frozen=True)
class Database:
    """A migrated database, and logins: one for each role, named like it, and a stranger."""

    url: str
    prefix: str

    def name(self, role: str) -> str:
        return f"{self.prefix}_{role}"

    def url_of(self, role: str) -> str:
        url = make_url(self.url).set(username=self.name(role), password="secret", drivername="postgresql")
        return url.render_as_string(hide_password=False)

    @contextmanager
    def session(self, role: str | None = None) -> Iterator[Connection]:
        """Give a session of the role's login, of a superuser without one; each statement commits."""
        with psycopg.connect(self.url if role is None else self.url_of(role), autocommit=True) as connection:
            yield connection


@contextmanager
def logins_in(url: str) -> Iterator[Database]:
    database = Database(url, f"test_{uuid4().hex[:8]}")
    with database.session() as admin:
        for role in (*ROLES, "stranger"):
            admin.execute(f"create role {database.name(role)} login password 'secret'")
        for role in ROLES:
            admin.execute(f"grant dovecote_{role} to {database.name(role)}")
    try:
        yield database
    finally:
        with database.session() as admin:
            for role in (*ROLES, "stranger"):
                admin.execute(f"drop owned by {database.name(role)}; drop role {database.name(role)}")


def fill(logins: Database) -> None:
    """Ten events: four dead, one of which another waits behind, one tried again later, and two replays."""
    with logins.session() as admin:
        admin.execute(
            "truncate dovecote.outbox, dovecote.processed_events, dovecote.deliveries, dovecote.replays,"
            " dovecote.audit_log, dovecote.paused_handlers, dovecote.subscriptions"
        )
        for n in range(10):
            admin.execute("select dovecote.append_event('price', %s, %s, '{}')", (str(n), TYPE))
        admin.execute(
            "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
            " event_type, state, next_attempt_at, error, error_type)"
            " select %s, id, position, 'price', case when n in (1, 5) then 'same' else n::text end, event_type,"
            " (array['dead', 'dead', 'dead', 'dead', 'waiting', 'retrying'])[n],"
            " case when n = 6 then now() + interval '1 hour' end, 'no', 'Refused'"
            " from (select *, row_number() over (order by position) as n from dovecote.outbox) o where n <= 6",
            (HANDLER,),
        )
        admin.execute(
            "insert into dovecote.paused_handlers (handler_name, actor, reason) values ('test.paused', 'eve', 'why')"
        )
        for state in ("running", "paused"):
            admin.execute(
                "insert into dovecote.replays (actor, reason, mode, handler_name, filter, state, total,"
                " done) values ('eve', 'why', 'backfill', %s, '{}', %s, 9, 5)",
                (f"test.{state}", state),
            )


def one(connection: Connection, query: str, parameters: Any = None) -> Any:
    row = connection.execute(query, parameters).fetchone()
    return None if row is None else row[0]


def lines(database: Database) -> list[tuple[Any, ...]]:
    with database.session() as admin:
        return admin.execute(
            "select actor, login, action, reason, affected from dovecote.audit_log order by id"
        ).fetchall()


def state_of(database: Database) -> str:
    """Everything that the verbs may change, as one text."""
    with database.session() as admin:
        return "\n".join(
            str(one(admin, f"select array_agg(t order by t::text)::text from dovecote.{table} t"))
            for table in (
                "deliveries",
                "replays",
                "paused_handlers",
                "subscriptions",
                "audit_log",
                "dropped_partitions",
            )
        )


#: A call of each verb, and what its line says: the action and how many were changed.
VERBS: Mapping[str, tuple[str, str, int | None]] = {
    "retry": ("dovecote.retry_deliveries(%(actor)s, %(reason)s, '{}')", "deliveries.retry", 4),
    "discard": ("dovecote.discard_deliveries(%(actor)s, %(reason)s, '{}')", "deliveries.discard", 4),
    "pause": ("dovecote.pause_handler(%(actor)s, %(reason)s, 'test.note')", "handlers.pause", None),
    "resume": ("dovecote.resume_handler(%(actor)s, %(reason)s, 'test.paused')", "handlers.resume", None),
    "start": (
        f"dovecote.start_replay(%(actor)s, %(reason)s, 'test.note', 'backfill', '{{}}', '{{{TYPE}}}')",
        "replay.start",
        4,
    ),
    **{
        f"{verb} a replay": (
            f"dovecote.{verb}_replay(%(actor)s, %(reason)s,"
            f" (select id from dovecote.replays where handler_name = 'test.{state}'))",
            f"replay.{verb}",
            5,
        )
        for verb, state in (("pause", "running"), ("resume", "paused"), ("cancel", "running"))
    },
}
CLAIMED = {"actor": "ada", "reason": "INC-7"}
