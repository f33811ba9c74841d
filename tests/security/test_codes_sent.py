"""The attack: make events or messages that have a code sent to another phone than the challenge's, or texts at all."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import make_url, text

from domain.verification import CodeRequested, UnknownCodeRequest, request_code
from dovecote.database import Sessions
from dovecote.events.ids import uuid7
from dovecote.privacy import Keyring
from dovecote.unit_of_work import unit_of_work
from tests.conftest import Servers, settings_for
from tests.support.phone_numbers import a_mobile
from tests.support.system import System, system_for
from workers.gateways import ChallengeCache, Gateways
from workers.handlers.verification import send_code
from workers.routes import ROUTES

pytestmark = pytest.mark.servers

KEYS = Keyring(hash_key=b"h" * 32, encryption_keys={"k1": b"e" * 32}, current="k1", code_key=b"c" * 32)


class Phone:
    """A gateway that remembers whom it was to send to."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def send(self, to: str, text: str, *, idempotency_key: str) -> None:
        self.asked.append(to)


def ask(sessions: Sessions, user: str, phone: str, keys: Keyring = KEYS) -> UUID:
    with unit_of_work(sessions) as uow:
        return request_code(uow, keys, user, phone, datetime.now(UTC)).id


def request_of(sessions: Sessions, challenge: UUID) -> UUID:
    with sessions() as session:
        found = session.scalars(text("select id from dovecote.outbox where aggregate_id = :it"), {"it": str(challenge)})
        return UUID(str(found.one()))


def test_a_request_with_another_challenge_s_id_sends_nothing(sessions: Sessions) -> None:
    """t_takeover.py: the waiting message of the victim's challenge got the id of the attacker's own."""
    victims, mine = ask(sessions, "victim", a_mobile()), ask(sessions, "mallory", a_mobile())
    phone = Phone()
    now = datetime.now(UTC)
    swapped = CodeRequested(
        challenge_id=mine, expires_at=now + timedelta(hours=1), occurred_at=now, event_id=request_of(sessions, victims)
    )

    with unit_of_work(sessions) as uow, pytest.raises(UnknownCodeRequest, match=str(mine)):
        send_code(swapped, uow, Gateways(sms=phone, challenges=ChallengeCache(None, "test"), keys=KEYS))

    assert phone.asked == []


@pytest.fixture
def system(fresh_database_url: str, servers: Servers, tmp_path: Path) -> Iterator[System]:
    settings = settings_for(fresh_database_url, servers.redis_url, tmp_path)
    with system_for(settings, ROUTES) as system, system.running():
        yield system


@pytest.mark.once
def test_a_writer_s_rows_send_nothing_and_reach_the_operators(
    system: System, fresh_database_url: str, tmp_path: Path
) -> None:
    """t_sms.py: twenty rows by a login that may only append were twenty texts to the victim."""
    challenge, now = ask(system.sessions, "victim", a_mobile(), system.gateways.keys), datetime.now(UTC)
    login = f"rogue_{uuid7().hex[-8:]}"
    with psycopg.connect(fresh_database_url, autocommit=True) as owner:
        owner.execute(f"create role {login} login password 'r' in role dovecote_writer")
        forged = json.dumps(
            {
                "challenge_id": str(challenge),
                "expires_at": (now + timedelta(days=3_650)).isoformat(),
                "occurred_at": now.isoformat(),
            }
        )
        own_url = make_url(fresh_database_url).set(username=login, password="r")
        with psycopg.connect(own_url.render_as_string(hide_password=False)) as rogue:
            for _ in range(20):
                rogue.execute(
                    "select dovecote.append_event('challenge', %s, 'verification.code_requested.v1', %s, '{}')",
                    (str(challenge), forged),
                )

        system.until_quiet()

        found = owner.execute(
            "select state, attempts, error_type, error, count(*) over () from dovecote.deliveries"
        ).fetchone()
        owner.execute(f"drop role {login}")

    assert found is not None
    assert (found[0], found[1], found[2].rpartition(".")[2], found[4]) == ("dead", 1, "UnknownCodeRequest", 20)
    assert "some other writer" in found[3]
    assert (tmp_path / "handset.txt").read_text().count("Your code is") == 1
