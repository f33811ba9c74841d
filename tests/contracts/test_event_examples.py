"""Every version of every event has one stored example, and it stays readable for ever."""

import json
from pathlib import Path
from typing import Any

import pytest

from domain import billing, pricing, verification
from dovecote.events import Event, known_events, read_event, readable_as, versioned
from dovecote.events.ids import uuid7

EXAMPLES = {path.stem: path for path in sorted((Path(__file__).parent / "examples").glob("*.json"))}
SLICES = (billing, pricing, verification)


def ours() -> dict[str, type[Event]]:
    """The events of the slices; a test's own are nobody's contract."""
    return {name: event for name, event in known_events().items() if event.__module__.startswith("domain.")}


def readable() -> set[str]:
    return {event_type for event in ours().values() for event_type in readable_as(event)}


def stored(event_type: str) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(EXAMPLES[event_type].read_text(encoding="utf-8"))
    return payload


def test_every_known_event_has_an_example_and_every_example_a_known_event() -> None:
    assert len(ours()) >= len(SLICES)

    assert set(EXAMPLES) == readable()


def test_every_version_ever_emitted_stays_readable() -> None:
    """A stored example is never taken out. To end a version is to end this line of it, in a review."""
    emitted = {
        "billing.membership_activated": 1,
        "billing.membership_cancelled": 2,
        "billing.membership_expired": 1,
        "billing.membership_renewed": 1,
        "billing.membership_started": 1,
        "billing.payment_recorded": 1,
        "billing.payment_refunded": 1,
        "billing.tier_changed": 1,
        "pricing.price_quoted": 1,
        "verification.code_rejected": 1,
        "verification.code_requested": 1,
        "verification.phone_verified": 1,
    }

    assert {f"{name}.v{n}" for name, newest in emitted.items() for n in range(1, newest + 1)} <= readable()


@pytest.mark.parametrize("event_type", sorted(set(EXAMPLES) - set(ours())))
def test_an_older_version_is_read_as_the_newest_and_says_the_same(event_type: str) -> None:
    event = read_event(event_type, uuid7(), stored(event_type))

    newest = event.type
    assert versioned(newest)[0] == versioned(event_type)[0]
    assert versioned(newest)[1] > versioned(event_type)[1]
    assert event.payload() == stored(newest)


@pytest.mark.parametrize("event_type", sorted(set(EXAMPLES) & set(ours())))
def test_an_example_is_read_and_written_back_as_it_was(event_type: str) -> None:
    event_id = uuid7()

    event = read_event(event_type, event_id, stored(event_type))

    assert type(event) is ours()[event_type]
    assert event.event_id == event_id
    assert event.payload() == stored(event_type)


@pytest.mark.parametrize("event_type", EXAMPLES)
def test_fields_that_newer_writers_add_are_ignored(event_type: str) -> None:
    event = read_event(event_type, uuid7(), {**stored(event_type), "a_field_of_tomorrow": {"any": ["thing"]}})

    assert event.payload() == stored(event.type)


@pytest.mark.parametrize("event_type", EXAMPLES)
def test_no_example_names_a_phone_or_a_code(event_type: str) -> None:
    assert not {"phone", "number", "code", "phone_hash", "code_hash"} & set(stored(event_type))
