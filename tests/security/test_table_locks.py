"""A login that may only look waits for a lock that keeps others out, and writers wait behind it: it is named."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import psycopg
import pytest
from sqlalchemy import make_url

from dovecote.operations.doctor.rights import foreign
from tests.security.traps import one, session
from tests.support.processes import eventually

pytestmark = pytest.mark.servers

NAMED = "select login, mode from dovecote.foreign_locks() where purpose = 'table'"
TRIGGER = "for each row execute function pg_catalog.suppress_redundant_updates_trigger()"


@pytest.fixture
def an_open_write(urls: Mapping[str, str]) -> Iterator[None]:
    with session(urls["writer"]) as writer, writer.transaction():
        writer.execute("select dovecote.append_event('order', '1', 'shop.order_placed.v1', '{}')")
        yield


@pytest.mark.parametrize("role", ["viewer", "writer", "service"])
@pytest.mark.parametrize(
    "statement",
    [
        f"create trigger t before insert on dovecote.outbox {TRIGGER}",
        "create rule r as on insert to dovecote.outbox do instead nothing",
        "create temporary table t (id uuid references dovecote.outbox (id))",
    ],
)
def test_who_keeps_others_from_a_table_without_a_right_to_is_named(
    urls: Mapping[str, str], an_open_write: None, role: str, statement: str
) -> None:
    login = make_url(urls[role]).username
    with session(urls[role]) as hostile, session(urls["viewer"]) as viewer:
        pid = hostile.info.backend_pid

        def wait() -> None:
            with pytest.raises(psycopg.Error):
                hostile.execute(statement)

        waiting = threading.Thread(target=wait)
        waiting.start()
        try:
            eventually(lambda: one(viewer, "select login from dovecote.foreign_locks()") == login, 5, "the login named")
            found = foreign(viewer)
        finally:
            hostile.cancel_safe()
            waiting.join()

    assert found.level == "warning"
    assert f"pid {pid} (login {login}" in found.found
    assert "Every statement on those tables waits" in found.advice


def test_who_may_lock_a_table_and_the_engine_are_not(urls: Mapping[str, str]) -> None:
    locks = {"owner": "outbox in share", "service": "latest_prices in exclusive", "worker": "deliveries in exclusive"}
    with ExitStack() as stack:
        for role, lock in locks.items():
            holder = stack.enter_context(session(urls[role]))
            stack.enter_context(holder.transaction())
            holder.execute(f"lock table dovecote.{lock} mode")

        viewer = stack.enter_context(session(urls["viewer"]))
        assert viewer.execute(NAMED).fetchall() == []
