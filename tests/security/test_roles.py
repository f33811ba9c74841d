"""A login that may only look changes something, or one of a service reaches the engine.

The database refuses it, whatever the client does: here the client is our own command.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from uuid import UUID

import psycopg
import pytest

from domain import billing, pricing, verification
from dovecote import operations
from dovecote.events.money import Money
from dovecote.operations.events import tail_events
from dovecote.privacy import Keyring
from dovecote.store.connections import connect, sessions_for
from dovecote.store.engines import engine_during
from dovecote.store.unrouted import MAX_TYPES, Unrouted
from dovecote.unit_of_work import UnitOfWork, unit_of_work
from dovecote.unit_of_work.emitting import Emitted
from tests.conftest import Servers, settings_for
from tests.support import commands
from tests.support.keys import KEYS

pytestmark = pytest.mark.servers

NOW = datetime.now(UTC)
HANDLER = "billing.write_history"

Dovecote = Callable[..., CompletedProcess[str]]


def one(url: str, query: str, *parameters: object) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        (value,) = connection.execute(query, parameters).fetchone() or (None,)
    return value


@pytest.fixture(scope="module")
def scene(urls: Mapping[str, str]) -> Mapping[str, str]:
    """Something of everything that there is to be changed; ids by name."""
    with psycopg.connect(urls["owner"], autocommit=True) as owner:
        dead = one(
            urls["owner"], "select dovecote.append_event('membership', '1', 'billing.payment_recorded.v1', '{}')"
        )
        owner.execute(
            "insert into dovecote.deliveries (handler_name, event_id, position, aggregate_type, aggregate_id,"
            " event_type, state, error, error_type, error_fingerprint)"
            " select %s, id, position, aggregate_type, aggregate_id, event_type, 'dead', 'no', 'ValueError', 'f'"
            " from dovecote.outbox",
            (HANDLER,),
        )
        owner.execute(
            "insert into dovecote.subscriptions (handler_name, event_type, since_position)"
            " values (%s, 'billing.payment_recorded.v1', 0), ('an.old_one', 'billing.payment_recorded.v1', 0)",
            (HANDLER,),
        )
        owner.execute("select dovecote.append_event('membership', '2', 'billing.payment_recorded.v1', '{}')")
        replay = one(
            urls["owner"],
            "insert into dovecote.replays (actor, reason, mode, handler_name, filter, state)"
            " values ('me', 'why', 'backfill', %s, '{}', 'paused') returning id",
            HANDLER,
        )
        owner.execute(
            "insert into dovecote.paused_handlers (handler_name, actor, reason)"
            " values ('pricing.apply_quotes', 'me', 'why')"
        )
        owner.execute("insert into dovecote.audit_log (actor, action) values ('me', 'test')")
        owner.execute("select setval('dovecote.outbox_position', 1, false)")  # something to recover
    return {"dead": str(dead), "replay": str(replay)}


@pytest.fixture
def dovecote(urls: Mapping[str, str], servers: Servers, tmp_path: Path) -> Dovecote:
    def run(role: str, *words: str) -> CompletedProcess[str]:
        environment = {
            "DATABASE_URL": urls[role],
            "REDIS_URL": servers.redis_url,
            "DOVECOTE_APP": "workers.app:app",
            "DOVECOTE_HOME": str(tmp_path),
            **KEYS,
        }
        return commands.run_text(list(words), environment, tmp_path)

    return run


LOOKS = [
    "status",
    "events list",
    "events show {dead}",
    "deliveries list",
    "deliveries list --rows",
    f"deliveries show {HANDLER} {{dead}}",
    "aggregates blocked",
    "handlers list",
    "audit",
    "replay list",
    "replay show {replay}",
    "partitions",
    "settings",
    "settings --in-force",
    "maintain --dry-run",
    "recover --dry-run",
    f"deliveries retry {HANDLER} {{dead}} --dry-run --reason x",
]
CHANGES = [
    f"deliveries retry {HANDLER} {{dead}} --reason x",
    "deliveries retry --all-matching --reason x",
    f"deliveries discard {HANDLER} {{dead}} --reason x",
    f"handlers pause {HANDLER} --reason x",
    "handlers resume pricing.apply_quotes --reason x",
    f"replay start --handler {HANDLER} --reason x",
    "replay resume {replay}",
    "replay cancel {replay} --reason x",
    "maintain",
    "maintain --unsubscribe an.old_one",
    "recover --reason x",
    "migrate",
    "ingest prices prices.csv",
]


@pytest.mark.parametrize("command", LOOKS)
def test_a_viewer_looks_at_everything(dovecote: Dovecote, scene: Mapping[str, str], command: str) -> None:
    done = dovecote("viewer", *command.format(**scene).split())

    assert done.returncode == 0, done.stderr + done.stdout


def test_doctor_examines_all_for_a_viewer(dovecote: Dovecote, scene: Mapping[str, str]) -> None:
    seen, by_owner = dovecote("viewer", "doctor"), dovecote("owner", "doctor")

    assert "permission denied" not in seen.stdout
    assert [line.split()[:2] for line in seen.stdout.splitlines() if line[:1].strip()] == [
        line.split()[:2] for line in by_owner.stdout.splitlines() if line[:1].strip()
    ]


_TABLES = "select relname from pg_class where relnamespace = 'dovecote'::regnamespace and relkind in ('r', 'p')"


def everything(url: str) -> Mapping[str, object]:
    with psycopg.connect(url) as connection:
        names = [name for (name,) in connection.execute(_TABLES + " and not relispartition order by 1")]
        return {
            name: connection.execute(f"select array_agg(t::text order by t::text) from dovecote.{name} t").fetchone()
            for name in names
        } | {"outbox_position": connection.execute("select * from dovecote.outbox_position").fetchone()}


@pytest.mark.parametrize("command", CHANGES)
def test_a_viewer_changes_nothing(
    dovecote: Dovecote, urls: Mapping[str, str], scene: Mapping[str, str], tmp_path: Path, command: str
) -> None:
    (tmp_path / "prices.csv").write_text("symbol,price,at\nEUR,1.10,2026-11-20\n")
    before = everything(urls["owner"])

    done = dovecote("viewer", *command.format(**scene).split())

    assert done.returncode == 1, done.stdout
    assert "permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert everything(urls["owner"]) == before


def test_a_viewer_follows_what_is_written(urls: Mapping[str, str], scene: Mapping[str, str]) -> None:
    one(urls["owner"], "select setval('dovecote.outbox_position', 1000)")
    written: list[UUID] = []

    def write() -> None:
        written.append(one(urls["writer"], "select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')"))

    followed = next(tail_events(urls["viewer"], write))

    assert followed.id in written


_RIGHTS = """
    select c.oid::regclass::text || ': ' || acl.privilege_type from pg_class c, aclexplode(c.relacl) acl
    where c.relnamespace = 'dovecote'::regnamespace and acl.grantee = %(role)s::regrole
    union all
    select a.attrelid::regclass::text || '.' || a.attname || ': ' || acl.privilege_type
    from pg_attribute a join pg_class c on c.oid = a.attrelid, aclexplode(a.attacl) acl
    where c.relnamespace = 'dovecote'::regnamespace and acl.grantee = %(role)s::regrole
    order by 1
"""
# Definer's rights, and it changes nothing; the marks of volatility are for rows that are read anew.
_RUNS_AS_OWNER = """
    select p.proname from pg_proc p
    where p.pronamespace = 'dovecote'::regnamespace and p.prosecdef
      and has_function_privilege(%(role)s, p.oid, 'execute')
    order by 1
"""


def rights(url: str, role: str, query: str = _RIGHTS) -> list[str]:
    with psycopg.connect(url, options="-c search_path=pg_catalog") as connection:
        return [right for (right,) in connection.execute(query, {"role": role})]


def test_a_viewer_s_rights_are_to_select_and_to_call_what_only_looks(urls: Mapping[str, str]) -> None:
    seen = rights(urls["owner"], "dovecote_viewer")

    assert {right.rpartition(" ")[2] for right in seen} == {"SELECT"}
    assert not [right for right in seen if "phone_ciphertext" in right or "code_hash" in right]
    assert "dovecote.challenges: SELECT" not in seen
    assert rights(urls["owner"], "dovecote_viewer", _RUNS_AS_OWNER) == ["known_message_keys", "processed_lately"]


def test_whatever_an_operator_sees_a_viewer_sees(urls: Mapping[str, str]) -> None:
    seen = {
        role: {right for right in rights(urls["owner"], f"dovecote_{role}") if right.endswith("SELECT")}
        for role in ("operator", "viewer")
    }

    assert seen["operator"] <= seen["viewer"]


@pytest.mark.parametrize("role", ["viewer", "service", "writer"])
@pytest.mark.parametrize(
    "statement",
    [
        "select pg_catalog.setval('dovecote.outbox_position', 1)",
        "lock table dovecote.outbox in share mode",
        "lock table dovecote.relay_state in row exclusive mode",
        "select 1 from dovecote.relay_state for update",
        "select dovecote.ensure_partitions()",
        "select dovecote.lock_partition('2026w01')",
        "select dovecote.drop_partition('2026w01', 'me')",
        "select dovecote.copy_misplaced_rows()",
        "select dovecote.place_misplaced_rows()",
        "select dovecote.recover_sequence()",
        "select dovecote.reopen_progress()",
        "select dovecote.unsubscribe_handler('a', 'b')",
        "select * from dovecote.move_low_water_marks(1, 1)",
        "select dovecote.release_parked('a', '{}', '{}')",
        "insert into dovecote.processed_events (event_id, handler_name) values (gen_random_uuid(), 'a')",
        "insert into dovecote.published_batches (positions, events, epoch) values ('{}', 0, 1)",
        "insert into dovecote.audit_log (actor, action) values ('a', 'b')",
        "update dovecote.deliveries set state = 'dead'",
        "update dovecote.replays set state = 'done'",
        "update dovecote.relay_state set checkpoint = 0",
        "delete from dovecote.subscriptions",
        "delete from dovecote.paused_handlers",
        "delete from dovecote.unrouted_types",
        "update dovecote.outbox set payload = '{}'",
        "truncate dovecote.progress",
        "set role dovecote_worker",
        "create table dovecote.mine (n integer)",
        "create function dovecote.mine() returns integer language sql return 1",
    ],
)
def test_who_is_no_worker_leaves_the_engine_alone(urls: Mapping[str, str], role: str, statement: str) -> None:
    with psycopg.connect(urls[role]) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement)


@pytest.mark.parametrize("table", ["relay_state", "deliveries", "processed_events", "published_batches", "replays",
                                   "outbox", "audit_log", "subscriptions", "progress", "outbox_events"])  # fmt: skip
def test_a_service_does_not_even_see_the_engine(urls: Mapping[str, str], table: str) -> None:
    with psycopg.connect(urls["service"]) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(f"select 1 from dovecote.{table}")


# What services are for ----------------------------------------------------------------------------


def the_keys() -> Keyring:
    return Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)


def billing_s_work(uow: UnitOfWork) -> None:
    one_of = billing.start_membership(uow, "user", billing.Tier.MONTHLY, NOW)
    billing.activate_membership(uow, one_of.id, NOW, until=NOW + timedelta(days=30))
    billing.record_payment(uow, one_of.id, Money(999, "EUR"), "invoice", "a month", NOW)
    billing.renew_membership(uow, one_of.id, NOW + timedelta(days=60), NOW)
    billing.cancel_membership(uow, one_of.id, NOW)
    assert billing.Memberships(uow).get(one_of.id).status is billing.Status.CANCELLED


def pricing_s_work(uow: UnitOfWork) -> None:
    quote = pricing.Quote(symbol="EUR", price=Decimal("1.10"), as_of=NOW)
    pricing.record_quotes(uow, [quote], NOW)
    pricing.record_quotes(uow, [quote], NOW)
    pricing.apply_quotes(uow, [(1, quote.to_event(NOW))])


def verification_s_work(uow: UnitOfWork) -> None:
    challenge = verification.request_code(uow, the_keys(), "user", "+491701234567", NOW)
    verdict = verification.answer_challenge(uow, the_keys(), challenge.id, "000000", NOW, user_id="user")
    assert isinstance(verdict, verification.CodeRejected)
    assert verification.tries_left(uow, challenge.id, NOW) == 2
    verification.purge_expired(uow, NOW)


def verification_is_answered(uow: UnitOfWork) -> None:
    challenge = verification.request_code(uow, the_keys(), "another", "+491701234568", NOW)
    requested = one_emitted(uow)
    code = verification.code_for(the_keys(), requested)
    verdict = verification.answer_challenge(uow, the_keys(), challenge.id, code, NOW, user_id="another")
    assert isinstance(verdict, verification.PhoneVerified)
    verification.forget_user(uow, "another")


def one_emitted(uow: UnitOfWork) -> UUID:
    """The id of the event that waits for the commit."""
    (waiting,) = Emitted.of(uow.session)._waiting
    id: UUID = waiting.row["id"]
    return id


@pytest.mark.parametrize(
    ("work", "events"),
    [(billing_s_work, 5), (pricing_s_work, 2), (verification_s_work, 2), (verification_is_answered, 2)],
)
def test_a_service_does_its_slices_work(
    urls: Mapping[str, str], work: Callable[[UnitOfWork], None], events: int
) -> None:
    count = "select count(*) from dovecote.outbox"
    before = one(urls["owner"], count)
    engine = connect(urls["service"])
    try:
        with unit_of_work(sessions_for(engine), keys=the_keys()) as uow:
            work(uow)
    finally:
        engine.dispose()

    assert one(urls["owner"], count) == before + events


# Types without end --------------------------------------------------------------------------------


def test_a_writer_of_types_without_end_fills_no_table(
    urls: Mapping[str, str], servers: Servers, dovecote: Dovecote, tmp_path: Path
) -> None:
    relay = Unrouted(set())
    with psycopg.connect(urls["worker"], autocommit=True) as worker:
        for position in range(1, MAX_TYPES + 501, 100):
            relay.meet([(n, f"made.up_{n}.v1", b"") for n in range(position, position + 100)])
            relay.write(worker)
        kept = one(urls["owner"], "select count(*) from dovecote.unrouted_types")

    assert kept == MAX_TYPES
    assert len(relay._written) <= MAX_TYPES + 100
    settings = settings_for(urls["viewer"], servers.redis_url, tmp_path)
    with engine_during(settings) as engine:
        newest = operations.status.get_status(engine, ()).unrouted
    assert (newest[0].event_type, len(newest)) == (f"made.up_{MAX_TYPES + 500}.v1", MAX_TYPES)
    shown = dovecote("viewer", "status").stdout
    assert shown.count("no route for") == 21
    assert f"no route for {MAX_TYPES - 20} more types" in shown
