"""What travels on the queue: CloudEvents 1.0 envelopes, in bundles, inside one Dramatiq message.

The relay never builds an envelope in Python: the SQL function `dovecote.envelope` writes it as text, and
bundles are joined from such texts. This module is the other end: it reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import UUID

from domain.events import Event, read_event
from domain.privacy import Keyring


@dataclass(frozen=True)
class Envelope:
    """One event on its way, with what the outbox knows of it.

    Shape:  `data` is the event's payload; `time` is ISO 8601; `position` is its place in the outbox;
            `keys` open its sensitive fields.
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

    @cached_property
    def event(self) -> Event:
        """The event itself.

        Errors: UnknownEvent, InvalidEvent, CannotOpen.
        """
        return read_event(self.type, self.event_id, self.data, self.keys)


def read_envelope(fields: Mapping[str, Any], keys: Keyring | None = None) -> Envelope:
    """Return the envelope of a JSON object.

    Errors: ValueError naming the attribute that is missing or wrong.
    """
    try:
        return Envelope(
            event_id=UUID(fields["id"]),
            type=fields["type"],
            aggregate_type=fields["source"].removeprefix("/dovecote/"),
            aggregate_id=fields["subject"],
            position=int(fields["position"]),
            time=fields["time"],
            data=fields["data"],
            traceparent=fields.get("traceparent"),
            correlation_id=fields.get("correlationid"),
            keys=keys,
        )
    except KeyError as error:
        raise ValueError(f"an envelope without {error.args[0]!r}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"an envelope that cannot be read: {error}") from error
