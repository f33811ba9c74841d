"""What travels on the queue: CloudEvents 1.0 envelopes, in bundles, inside one Dramatiq message.

The relay never builds an envelope in Python: the SQL function `dovecote.envelope` writes it as text, and the relay
joins such texts to bundles (wire.py). This module reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import UUID

import orjson

from dovecote.envelope.wire import BEFORE_DATA, EVENT_ID_PATTERN, FIELDS, HEAD_PATTERN, HEADERS_PATTERN
from dovecote.errors import InvalidEvent, cut, shown, shown_error
from dovecote.events import Event, read_event
from dovecote.events.records import record
from dovecote.privacy import Keyring


@dataclass(frozen=True)
class Envelope:
    """One event on its way, with what the outbox knows of it.

    Shape:  `data` is the event's payload; `time` is ISO 8601; `position` is its place in the outbox;
            `keys` decrypt its sensitive fields.
    """

    event_id: UUID
    type: str
    aggregate_type: str
    aggregate_id: str
    position: int
    time: str
    data: Mapping[str, Any]
    traceparent: str | None = None
    correlation_id: str | None = None
    keys: Keyring | None = field(default=None, repr=False)
    unreadable: str | None = None

    @cached_property
    def event(self) -> Event:
        """The event itself.

        Errors: UnknownEvent, InvalidEvent, CannotDecrypt.
        """
        if self.unreadable is not None:
            raise InvalidEvent(f"{self.type} {self.event_id}: its payload cannot be read: {cut(self.unreadable, 200)}")
        return read_event(self.type, self.event_id, self.data, self.keys)


def read_message(data: bytes) -> dict[str, Any]:
    """Return the fields of a message of Dramatiq's.

    Errors: ValueError for what is no such message.
    """
    return _checked(orjson.loads(data))


@dataclass(frozen=True)
class Broken:
    """A line of a bundle that is no envelope; `event_id` is None where even that cannot be read."""

    event_id: UUID | None
    problem: str


@dataclass(frozen=True)
class Contents:
    """What a bundle contains.

    sent_in  the run of Postgres in which the relay has read the events; None for a message without it
    """

    handler: str
    queue: str
    id: str
    envelopes: list[Envelope]
    broken: list[Broken]
    retry: bool
    replay: UUID | None
    sent_in: str | None


def handler_named_in(data: bytes) -> str | None:
    """Return the handler that a bundle names; None for what does not begin as a bundle."""
    head = HEAD_PATTERN.match(data)
    return head[2].decode() if head else None


def read_bundle(data: bytes, keys: Keyring | None = None) -> Contents:
    """Return what is in a bundle as the relay writes it, one envelope a line.

    Postgres accepts JSON that the parser here refuses, such as 1e400 or a thousand brackets. Such a payload does not
    affect the rest of its bundle: its envelope has no `data`, and the reason in `unreadable`. With such a header it has
    no headers. A line that is no envelope is in `broken`, and does not affect the rest either.
    Errors: ValueError for what is no bundle.
    """
    begin, end = data.find(b"\n"), data.rfind(b"\n")
    head, tail = data[: max(0, begin)], data[end + 1 :]
    if begin == end or HEAD_PATTERN.fullmatch(head) is None:
        raise ValueError("not a bundle: it does not begin as one")
    # What comes before the envelopes and behind them, without them: nothing in them can pretend to be any of it.
    message = _checked(orjson.loads(head + tail))
    kwargs, sent_in = message["kwargs"], message["options"].get("sent_in")
    if (
        not kwargs.keys() <= {"retry", "replay"}
        or not isinstance(kwargs.get("retry", False), bool)
        or not isinstance(kwargs.get("replay", ""), str)
    ):
        raise ValueError("a bundle with arguments that no relay of this version writes")
    envelopes, broken = _envelopes(data[begin + 1 : end], keys)
    return Contents(
        handler=message["actor_name"],
        queue=message["queue_name"],
        id=message["message_id"],
        envelopes=envelopes,
        broken=broken,
        retry=kwargs.get("retry", False),
        replay=UUID(kwargs["replay"]) if "replay" in kwargs else None,
        sent_in=sent_in if isinstance(sent_in, str) and sent_in.isascii() and sent_in.isprintable() else None,
    )


def _envelopes(text: bytes, keys: Keyring | None) -> tuple[list[Envelope], list[Broken]]:
    try:
        # In one go, which is faster by far.
        found = orjson.loads(b"[%b]" % text)
        if len(found) == text.count(b"\n") + 1:
            return [read_envelope(fields, keys) for fields in found], []
    except ValueError:
        pass
    envelopes: list[Envelope] = []
    broken: list[Broken] = []
    for line in text.split(b"\n"):
        try:
            envelopes.append(read_envelope(_read_alone(line.removesuffix(b",")), keys))
        except ValueError as error:
            broken.append(Broken(_event_id_in(line), str(error)))
    return envelopes, broken


def _event_id_in(line: bytes) -> UUID | None:
    # The server writes it first: what a writer has put into a line comes behind it.
    found = EVENT_ID_PATTERN.match(line)
    return UUID(found[1].decode()) if found else None


def _checked(message: Any) -> dict[str, Any]:
    # Every fetch of a message without one of them would fail.
    if not isinstance(message, dict) or not message.keys() >= FIELDS.keys():
        raise ValueError("not a message of Dramatiq: fields are missing")
    for name, kind in FIELDS.items():
        if not isinstance(message[name], kind):
            raise ValueError(f"not a message of Dramatiq: {name} is no {kind.__name__}")
    if not isinstance(message["options"].get("redis_message_id"), str):
        raise ValueError("not a message of Dramatiq's Redis broker: its options have no redis_message_id")
    return message


def _read_alone(line: bytes) -> dict[str, Any]:
    _, without_headers, payload = _parts(line)
    try:
        return _first_readable(line, without_headers + BEFORE_DATA + payload)
    except orjson.JSONDecodeError as error:
        return {**read_head(line), "data": None, "unreadable": str(error)}


def read_head(line: bytes) -> dict[str, Any]:
    """Return everything of an envelope but its payload, and without headers that cannot be read.

    Errors: ValueError for what is no envelope.
    """
    attributes, without_headers, _ = _parts(line)
    return _first_readable(attributes + b"}", without_headers + b"}")


def payload_of(line: bytes) -> bytes:
    """Return the payload of an envelope, as JSON."""
    return _parts(line)[2].removesuffix(b"}")


def _parts(line: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the attributes, the same without what a writer may have put into headers, and the payload."""
    attributes, _, payload = line.partition(BEFORE_DATA)
    return attributes, HEADERS_PATTERN.sub(rb"\1", attributes), payload


def _first_readable(text: bytes, otherwise: bytes) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = orjson.loads(text)
    except orjson.JSONDecodeError:
        fields = orjson.loads(otherwise)
    if not isinstance(fields, dict):
        raise ValueError("a line that is no envelope: it is not a JSON object")
    return fields


def read_envelope(fields: Mapping[str, Any], keys: Keyring | None = None) -> Envelope:
    """Return the envelope of a JSON object.

    Errors: ValueError naming the attribute that is missing or wrong.
    """
    try:
        return record(
            Envelope,
            {
                "event_id": UUID(fields["id"]),
                "type": fields["type"],
                "aggregate_type": fields["source"].removeprefix("/dovecote/"),
                "aggregate_id": fields["subject"],
                "position": int(fields["position"]),
                "time": fields["time"],
                "data": fields["data"],
                # Headers are chosen by the writer: one that is no text must not lose the event.
                "traceparent": _text_or_none(fields.get("traceparent")),
                "correlation_id": _text_or_none(fields.get("correlationid")),
                "keys": keys,
                "unreadable": fields.get("unreadable"),
            },
        )
    except KeyError as error:
        raise ValueError(f"an envelope without {shown(error.args[0])}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"an envelope that cannot be read: {shown_error(error)}") from error


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
