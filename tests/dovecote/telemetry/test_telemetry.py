"""What must never be in a log, however it got there."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from dramatiq import Message
from dramatiq.broker import MessageProxy

from dovecote.settings import Telemetry
from dovecote.telemetry.configure import configure


@pytest.fixture(params=["console", "json"])
def log_format(request: pytest.FixtureRequest) -> Iterator[str]:
    before = logging.getLogger().handlers[:]
    yield request.param
    logging.getLogger().handlers[:] = before
    structlog.reset_defaults()


def test_numbers_and_passwords_are_masked_in_every_value(log_format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configure(Telemetry(log_format=log_format), "test")
    structlog.get_logger().info(
        "calling +49 30 901820", url="postgresql://u:hunter2@db/x", nested={"to": ["+12015550123"]}
    )
    logging.getLogger("somebody").warning("cannot reach %s for %s", "redis://:hunter2@cache:6379", "+12015550123")

    said = capsys.readouterr().err
    assert "hunter2" not in said
    assert "2015550123" not in said.replace(" ", "")
    assert "901820" not in said
    assert "cannot reach" in said


def test_a_traceback_is_masked(log_format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configure(Telemetry(log_format=log_format), "test")
    try:
        raise ValueError("no route to +12015550123 over redis://:hunter2@cache")
    except ValueError:
        structlog.get_logger().exception("failed")

    said = capsys.readouterr().err
    assert "ValueError" in said
    assert "2015550123" not in said
    assert "hunter2" not in said


def test_dramatiq_names_a_message_and_does_not_print_it(log_format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configure(Telemetry(log_format=log_format), "test")
    message: Message[None] = Message("billing", "billing.write_history", ([{"data": "a payload"}],), {}, {}, "m-1")

    logging.getLogger("dramatiq.worker").warning("Failed to post_process_message(%s)", MessageProxy(message))

    said = capsys.readouterr().err
    assert "billing.write_history m-1" in said
    assert "a payload" not in said
