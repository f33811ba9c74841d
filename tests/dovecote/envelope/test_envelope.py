"""A payload or a header that no parser here can read takes nothing along but itself."""

from collections.abc import Iterator

import orjson
import pytest
from sqlalchemy import text

from dovecote.envelope import read_bundle
from dovecote.envelope.stored_json import read_stored
from dovecote.errors import InvalidEvent
from dovecote.relay.bundler import Bundler
from dovecote.settings import Settings
from tests.support.system import System, system_for
from workers.routes import ROUTES

ID = "01a1f94c-b163-7128-b3a1-26224ce3d3c1"
UNREADABLE = ["1e400", "1" * 5_000, "[" * 1_500 + "]" * 1_500]


def an_envelope(position: int, extra: str = "0", subject: str = "EUR", headers: str = "") -> bytes:
    return (
        f'{{"specversion":"1.0","id":"{ID}","source":"/dovecote/price","type":"pricing.price_quoted.v1",'
        f'"subject":"{subject}","time":"2026-11-20T12:00:00+00:00","position":"{position}"{headers},'
        f'"data":{{"symbol": "EUR", "price": "1", "x": {extra}}}}}'
    ).encode()


def a_message(*envelopes: bytes) -> bytes:
    rows = [(n, "pricing.price_quoted.v1", envelope) for n, envelope in enumerate(envelopes)]
    (bundle,) = Bundler(ROUTES).bundles(rows)
    return bundle.message


def test_a_row_of_which_no_envelope_can_be_made_is_in_no_message() -> None:
    message = a_message(an_envelope(1), b"", an_envelope(3))

    assert [int(envelope["position"]) for envelope in orjson.loads(message)["args"][0]] == [1, 3]


def test_of_a_number_that_python_cannot_write_a_command_shows_the_beginning() -> None:
    assert read_stored('{"a": %s, "b": 1}' % ("9" * 5_000)) == {"a": f"{'9' * 40}... (5000 digits)", "b": 1}


@pytest.mark.parametrize("extra", UNREADABLE, ids=["too large", "too many digits", "too deep"])
def test_a_message_is_read_around_a_payload_that_cannot_be(extra: str) -> None:
    first, second, third = read_bundle(
        a_message(an_envelope(1), an_envelope(2, extra, subject='a \\",\\"data\\":'), an_envelope(3))
    ).envelopes

    assert (first.data["symbol"], third.data["symbol"]) == ("EUR", "EUR")
    assert (second.position, second.aggregate_id) == (2, 'a ","data":')
    with pytest.raises(InvalidEvent, match="its payload cannot be read"):
        _ = second.event


@pytest.mark.parametrize("extra", ["0", "1e400"], ids=["a payload that can", "a payload that cannot be"])
@pytest.mark.parametrize("header", UNREADABLE, ids=["too large", "too many digits", "too deep"])
def test_a_message_is_read_around_a_header_that_cannot_be(header: str, extra: str) -> None:
    headers = f',"traceparent":{header},"correlationid":"mine"'
    first, second, third = read_bundle(
        a_message(an_envelope(1), an_envelope(2, extra, headers=headers), an_envelope(3))
    ).envelopes

    assert (first.data["symbol"], third.data["symbol"]) == ("EUR", "EUR")
    assert (second.position, second.aggregate_id, second.traceparent) == (2, "EUR", None)
    assert second.data == (None if extra == "1e400" else {"symbol": "EUR", "price": "1", "x": 0})


def test_a_payload_that_cannot_be_read_keeps_its_trace() -> None:
    (envelope,) = read_bundle(a_message(an_envelope(1, "1e400", headers=',"traceparent":"00-ab-cd-01"'))).envelopes

    assert envelope.traceparent == "00-ab-cd-01"


@pytest.fixture
def system(settings: Settings) -> Iterator[System]:
    with system_for(settings, ROUTES) as system, system.running():
        yield system


@pytest.mark.servers
def test_its_event_is_dead_and_its_bundle_mates_go_through(system: System) -> None:
    with system.engine.begin() as connection:
        for extra in ["0", *UNREADABLE, "0"]:
            payload = (
                f'{{"symbol": "EUR", "price": "1", "as_of": "2026-11-20T12:00:00Z", '
                f'"occurred_at": "2026-11-20T12:00:00Z", "x": {extra}}}'
            )
            connection.execute(
                text(
                    "select dovecote.append_event('price', 'EUR', 'pricing.price_quoted.v1', cast(:payload as jsonb))"
                ),
                {"payload": payload},
            )

    handler = system.until_quiet().handlers["pricing.apply_quotes"]

    assert (handler.processed, handler.dead) == (2, len(UNREADABLE))
