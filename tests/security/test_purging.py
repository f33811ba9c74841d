"""The attack: read what should be gone. Encrypted numbers of challenges that nobody answered stayed for ever."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError
from typer.testing import CliRunner

from domain.verification import VerifiedPhones, answer_challenge, code_for, forget_user, request_code
from domain.verification.phone import phone_hash
from dovecote.cli import app
from dovecote.database import Sessions
from dovecote.operations.purging import purge
from dovecote.privacy import Keyring
from dovecote.store.connections import connect, sessions_for
from dovecote.unit_of_work import unit_of_work
from tests.conftest import Servers, settings_for
from tests.support.phone_numbers import a_mobile
from tests.support.processes import eventually
from tests.support.system import system_for
from workers.app import app as application

pytestmark = pytest.mark.servers

KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)
NOW = datetime.now(UTC)
KEPT, OVER = NOW - timedelta(hours=23), NOW - timedelta(days=1, minutes=6)


@pytest.fixture
def engine(fresh_database_url: str) -> Iterator[Engine]:
    engine = connect(fresh_database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> Sessions:
    return sessions_for(engine)


def ask(sessions: Sessions, user: str, at: datetime) -> None:
    with unit_of_work(sessions) as uow:
        request_code(uow, KEYS, user, a_mobile(), at)


def left(engine: Engine) -> tuple[list[str], int]:
    with engine.connect() as connection:
        users = connection.scalars(text("select user_id from dovecote.challenges order by user_id")).all()
        return list(users), connection.execute(text("select count(*) from dovecote.verification_quotas")).scalar_one()


def test_what_is_over_goes_and_what_is_not_stays(engine: Engine, sessions: Sessions) -> None:
    ask(sessions, "over", OVER)
    ask(sessions, "kept", KEPT)

    assert purge(engine, application.purges) == 3
    assert left(engine) == (["kept"], 2)
    assert purge(engine, application.purges) == 0


def test_it_takes_more_than_a_batch_and_waits_for_nobody(engine: Engine, sessions: Sessions) -> None:
    ask(sessions, "over", OVER)
    with engine.begin() as connection:
        connection.execute(
            text(
                "insert into dovecote.challenges select gen_random_uuid(), 'u' || n, phone_hash, phone_ciphertext,"
                " phone_last4, code_hash, expires_at, 3, created_at"
                " from dovecote.challenges, generate_series(1, 2500) n"
            )
        )

    with engine.begin() as other:
        other.execute(text("select from dovecote.challenges where user_id = 'over' for update"))
        assert purge(engine, application.purges) == 2_502
    assert left(engine) == (["over"], 0)
    assert purge(engine, application.purges) == 1


def test_it_reads_an_index(engine: Engine, sessions: Sessions) -> None:
    with engine.connect() as connection:
        connection.execute(text("set local enable_seqscan = off"))
        for table, column in (("challenges", "expires_at"), ("verification_quotas", "last_at")):
            plan = "\n".join(
                connection.scalars(
                    text(f"explain select from dovecote.{table} where {column} < now() order by {column} limit 10")
                )
            )
            assert "Index" in plan, plan


@pytest.mark.once
def test_the_relay_removes_it_by_itself(
    engine: Engine, sessions: Sessions, fresh_database_url: str, servers: Servers, tmp_path: Path
) -> None:
    ask(sessions, "over", OVER)
    ask(sessions, "kept", KEPT)

    with (
        system_for(settings_for(fresh_database_url, servers.redis_url, tmp_path), []) as system,
        system.relay(purges=application.purges),
    ):
        eventually(lambda: left(engine) == (["kept"], 2), 30, "the expired challenge removed by the relay")


@pytest.mark.parametrize("role", ["dovecote_worker", "dovecote_operator"])
def test_maintain_removes_it_or_says_that_it_may_not(
    engine: Engine, sessions: Sessions, fresh_database_url: str, tmp_path: Path, role: str
) -> None:
    ask(sessions, "over", OVER)
    login = f"test_{uuid4().hex[:8]}"
    with engine.begin() as connection:
        connection.execute(text(f"create role {login} login password 'p' in role {role}"))
    own_url = engine.url.set(username=login, password="p").set(drivername="postgresql").render_as_string(False)

    def maintain(*words: str) -> str:
        env = {"DATABASE_URL": own_url, "DOVECOTE_HOME": str(tmp_path)}
        return CliRunner().invoke(app, ["maintain", *words], env=env, catch_exceptions=False).stdout

    try:
        assert "personal data" not in maintain("--dry-run")
        printed = maintain()
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"drop role {login}"))

    if role == "dovecote_worker":
        assert "3 rows of personal data removed" in printed
        assert left(engine) == ([], 0)
    else:
        assert "no personal data was removed: this login may not" in printed
        assert left(engine) == (["over"], 2)


def test_a_user_can_be_forgotten_and_is_still_limited(engine: Engine, sessions: Sessions) -> None:
    with unit_of_work(sessions) as uow:
        challenge = request_code(uow, KEYS, "user", phone := a_mobile(), NOW)
    with engine.connect() as connection:
        event = connection.execute(text("select id from dovecote.outbox")).scalar_one()
    with unit_of_work(sessions) as uow:
        answer_challenge(uow, KEYS, challenge.id, code_for(KEYS, event), NOW, user_id="user")
    ask(sessions, "user", NOW + timedelta(minutes=1))
    ask(sessions, "other", NOW)

    with unit_of_work(sessions) as uow:
        uow.session.execute(text("set local role dovecote_worker"))
        assert forget_user(uow, "user") == 2

    with unit_of_work(sessions) as uow:
        assert VerifiedPhones(uow).verified_at("user", phone_hash(KEYS, phone)) is None
    assert left(engine) == (["other"], 5)


RIGHTS = {
    "dovecote_owner": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "dovecote_worker": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "dovecote_service": {"SELECT", "INSERT", "UPDATE", "DELETE"},
    "dovecote_operator": {"SELECT"},
    "dovecote_viewer": {"SELECT"},
    "dovecote_writer": set(),
}


@pytest.mark.parametrize("role", RIGHTS)
def test_only_those_who_ask_and_answer_change_what_is_counted(engine: Engine, role: str) -> None:
    with engine.connect() as connection:
        held = {
            right
            for right in ("SELECT", "INSERT", "UPDATE", "DELETE")
            if connection.execute(
                text("select has_table_privilege(:role, 'dovecote.verification_quotas', :right)"),
                {"role": role, "right": right},
            ).scalar_one()
        }

    assert held == RIGHTS[role]


def test_a_number_in_the_clear_is_not_counted(engine: Engine) -> None:
    with pytest.raises(IntegrityError, match="verification_quotas_phone_is_a_sha_256"), engine.begin() as connection:
        connection.execute(
            text("insert into dovecote.verification_quotas values ('phone', '+4915112345678', '{}', '{}', now())")
        )
