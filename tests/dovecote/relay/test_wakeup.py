"""When the relay holds the lock that has writers call it."""

from typing import Any

import pytest

from dovecote.processes.stop_flag import StopFlag
from dovecote.relay.wakeup import Wakeup
from dovecote.settings import Settings
from dovecote.telemetry.instrumentation import RelayInstrumentation
from tests.support.outbox_rows import Connection
from tests.support.processes import eventually

pytestmark = pytest.mark.servers


class Sleepless(StopFlag):
    """Remembers for how long it was to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    def sleep(self, seconds: float, connection: Any = None) -> bool:
        self.slept.append(seconds)
        return False


def a_writer_would_call(writer: Connection) -> bool:
    row = writer.execute("select pg_try_advisory_xact_lock_shared(dovecote.wakeup_key())").fetchone()
    writer.rollback()
    return row == (False,)


def test_the_relay_reads_once_more_between_taking_the_lock_and_sleeping(
    settings: Settings, opened: Any, relays: Connection
) -> None:
    sleeper, writer = Sleepless(), opened()
    waking = Wakeup(relays, sleeper, settings.relay, RelayInstrumentation())
    assert not a_writer_would_call(writer)

    assert not waking.may_sleep()

    assert a_writer_would_call(writer)
    assert sleeper.slept == []
    assert waking.may_sleep()


def test_writers_need_not_call_a_relay_that_stays_awake_after_it_has_slept(
    settings: Settings, opened: Any, relays: Connection
) -> None:
    waking = Wakeup(relays, Sleepless(), settings.relay, RelayInstrumentation())
    waking.may_sleep()

    waking.stay_awake()

    assert not a_writer_would_call(opened())
    assert not waking.may_sleep()  # and it reads once more before it sleeps again


class Counted(RelayInstrumentation):
    wakeups = 0

    def rang(self) -> None:
        self.wakeups += 1


def test_a_wake_up_is_heard_and_counted(settings: Settings, opened: Any, relays: Connection) -> None:
    counted, writer = Counted(), opened()
    waking = Wakeup(relays, Sleepless(), settings.relay, counted)
    waking.listen()

    writer.execute("notify dovecote_outbox")
    writer.commit()

    eventually(lambda: relays.execute("select") and waking.heard, 5, "the wake-up")
    assert counted.wakeups == 1
