"""Older versions of an event are read as the newest; what does not fit says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from domain.billing import MembershipCancelled
from dovecote import events
from dovecote.errors import InvalidEvent, UnknownEvent
from dovecote.events import Event, read_event, readable_as, upcaster, versioned
from dovecote.events.ids import uuid7

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass(frozen=True, kw_only=True)
class Weighed(Event, type="upcast.weighed.v3", aggregate="thing", key="thing"):
    thing: str
    grams: Decimal
    scale: str


@upcaster("upcast.weighed.v1", "upcast.weighed.v2")
def _in_grams(payload: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(payload)
    return {**fields, "grams": str(Decimal(fields.pop("kilograms")) * 1000)}


@upcaster("upcast.weighed.v2", "upcast.weighed.v3")
def _on_a_scale(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {**payload, "scale": "unknown"}


@pytest.mark.parametrize(
    ("event_type", "payload"),
    [
        ("upcast.weighed.v1", {"kilograms": "1.5"}),
        ("upcast.weighed.v2", {"grams": "1500.0"}),
        ("upcast.weighed.v3", {"grams": "1500.0", "scale": "unknown"}),
    ],
)
def test_upcasters_are_chained(event_type: str, payload: dict[str, str]) -> None:
    event = read_event(event_type, uuid7(), {"occurred_at": NOON.isoformat(), "thing": "a", **payload})

    assert isinstance(event, Weighed)
    assert (event.grams, event.scale, event.type) == (Decimal("1500.0"), "unknown", "upcast.weighed.v3")


def test_a_class_is_read_from_all_of_its_versions() -> None:
    assert readable_as(Weighed) == ["upcast.weighed.v3", "upcast.weighed.v2", "upcast.weighed.v1"]


def test_an_upcaster_changes_nothing_in_what_it_is_given() -> None:
    given = {"occurred_at": NOON.isoformat(), "thing": "a", "kilograms": "1"}

    read_event("upcast.weighed.v1", uuid7(), given)

    assert given == {"occurred_at": NOON.isoformat(), "thing": "a", "kilograms": "1"}


def test_a_newer_version_than_we_know_is_unknown() -> None:
    with pytest.raises(UnknownEvent, match=r"upcast\.weighed\.v4"):
        read_event("upcast.weighed.v4", uuid7(), {})


@pytest.mark.parametrize("payload", [{}, {"kilograms": "many"}, {"kilograms": None}])
def test_a_payload_that_is_not_of_its_version_is_invalid(payload: dict[str, Any]) -> None:
    with pytest.raises(InvalidEvent, match="not of that version"):
        read_event("upcast.weighed.v1", uuid7(), payload)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("upcast.weighed.v1", "upcast.weighed.v3"),
        ("upcast.weighed.v2", "upcast.weighed.v1"),
        ("upcast.weighed.v1", "upcast.counted.v2"),
        ("upcast.weighed", "upcast.weighed.v2"),
    ],
)
def test_an_upcaster_leads_to_the_next_version_of_the_same_event(older: str, newer: str) -> None:
    with pytest.raises(InvalidEvent):
        upcaster(older, newer)


def test_a_version_has_one_upcaster() -> None:
    with pytest.raises(InvalidEvent, match="already"):
        upcaster("upcast.weighed.v1", "upcast.weighed.v2")(lambda payload: payload)
    assert events._upcasters["upcast.weighed.v1"][1] is _in_grams


def test_versions_are_numbers() -> None:
    assert versioned("a.b.v10") > versioned("a.b.v9")


@pytest.mark.parametrize(
    ("runs_until", "ends_at"), [("2026-04-01T12:00:00+00:00", datetime(2026, 4, 1, 12, tzinfo=UTC)), (None, NOON)]
)
def test_a_cancellation_of_the_first_version_ends_with_its_period_or_at_once(
    runs_until: str | None, ends_at: datetime
) -> None:
    payload = {"occurred_at": NOON.isoformat(), "membership_id": str(uuid7()), "user_id": "u", "runs_until": runs_until}

    event = read_event("billing.membership_cancelled.v1", uuid7(), payload)

    assert isinstance(event, MembershipCancelled)
    assert event.ends_at == ends_at
