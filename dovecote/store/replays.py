"""Which events a replay is about: the table `replays` and the SQL that finds its events.

Two modes. `backfill` sends what the handler has neither acted on nor has in `deliveries`. `reprocess` has it act once
more on what it has acted on. What is in `deliveries` already is in neither: it has a schedule of its
own, or waits for an operator's word.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from dovecote.errors import DovecoteError

Mode = Literal["backfill", "reprocess"]

# Characters of a strange value that a sentence repeats.
_MAX_SHOWN = 40

#: The relay listens to it: a replay was asked for, paused, resumed or cancelled.
CHANNEL = "dovecote_replays"


class NotUnderstood(DovecoteError):
    """A row of `replays` that this version cannot carry out: a newer version's, or one that was written by hand."""


@dataclass(frozen=True, kw_only=True)
class ReplaySelection:
    """What must be true of an event; what is None is not asked.

    since, until           when its id was made; until is not in it
    from_position, upto_position  its place in the outbox; both are in it
    """

    event_types: tuple[str, ...] | None = None
    aggregate_type: str | None = None
    aggregate_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    from_position: int | None = None
    upto_position: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what is asked, for the row."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_json(cls, stored: object) -> "ReplaySelection":
        """Return the filter of a row, which anybody with a right on the table may have written.

        Errors: NotUnderstood, for whatever `as_json` does not write.
        """
        if not isinstance(stored, Mapping):
            raise NotUnderstood(f"its filter is not a JSON object but {_shown(stored)}")
        understood = {}
        for name, value in stored.items():
            read = _READ.get(name)
            if read is None:
                raise NotUnderstood(f"unknown key {_shown(name)} in its filter")
            try:
                understood[name] = read(value)
            except (ValueError, TypeError):
                raise NotUnderstood(f"{name} in its filter is {_shown(value)}") from None
        return cls(**understood)

    def conditions(self) -> str:
        """Return SQL on the outbox row `o`; `parameters` are its values."""
        return " and ".join(["o.event_type = any(%(event_types)s)", *self._asked()])

    def parameters(self, handler: str, event_types: list[str]) -> dict[str, Any]:
        """Return the values for `conditions` and for `is_matched`; `event_types` are what the handler wants."""
        return {**asdict(self), "handler": handler, "event_types": list(self.event_types or event_types)}

    def _asked(self) -> list[str]:
        words = {
            "aggregate_type": "o.aggregate_type = %(aggregate_type)s",
            "aggregate_id": "o.aggregate_id = %(aggregate_id)s",
            # Ids begin with their time: a range of time is a range of the primary key.
            "since": "o.id >= dovecote.uuid_v7_lower_bound(%(since)s::timestamptz)",
            "until": "o.id < dovecote.uuid_v7_lower_bound(%(until)s::timestamptz)",
            "from_position": "o.position >= %(from_position)s",
            "upto_position": "o.position <= %(upto_position)s",
        }
        return [words[name] for name in words if getattr(self, name) is not None]


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _words(value: object) -> tuple[str, ...]:
    # None at all would be taken for all of them.
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TypeError
    return tuple(_word(word) for word in value)


def _timestamp(value: object) -> datetime:
    return datetime.fromisoformat(_word(value))


def _position(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError
    return value


_READ: Mapping[str, Callable[[object], Any]] = {
    "event_types": _words,
    "aggregate_type": _word,
    "aggregate_id": _word,
    "since": _timestamp,
    "until": _timestamp,
    "from_position": _position,
    "upto_position": _position,
}


def _shown(value: object) -> str:
    """Return the beginning of a value that may be of any kind and size."""
    if isinstance(value, str):
        return ascii(value[:_MAX_SHOWN])
    if value is None:
        return "null"
    if isinstance(value, bool | float):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if -(2**63) <= value < 2**63 else "a number beyond 64 bits"
    return "a list" if isinstance(value, Sequence) else "an object"


# Joined to an outbox row `o`: what the handler has done with it.
KNOWN = """
    left join dovecote.processed_events p on p.event_id = o.id and p.handler_name = %(handler)s
    left join dovecote.deliveries d on d.event_id = o.id and d.handler_name = %(handler)s
"""

# The same, row by row through the keys: for a few events among millions, whatever the planner thinks of the tables.
KNOWN_BY_KEY = """
    left join lateral (select * from dovecote.processed_events
                       where event_id = o.id and handler_name = %(handler)s limit 1) p on true
    left join lateral (select * from dovecote.deliveries
                       where event_id = o.id and handler_name = %(handler)s limit 1) d on true
"""

# What happened after the replay was asked for does not take an event out of it: it only settles it.
_MATCHED: dict[str, str] = {
    "backfill": """
        (p.event_id is null or p.processed_at > %(asked_at)s)
        and (d.event_id is null or d.first_failed_at > %(asked_at)s)
    """,
    "reprocess": """
        (p.processed_at <= %(asked_at)s or p.replay_id = %(replay)s)
        and (d.event_id is null or d.replay_id = %(replay)s)
    """,
}

_SETTLED: dict[str, str] = {
    "backfill": "(p.event_id is not null or d.event_id is not null)",
    # Gone from processed_events: its week was dropped meanwhile, and it must not be acted on any more.
    "reprocess": "(p.replay_id is not distinct from %(replay)s or p.event_id is null or d.event_id is not null)",
}


def is_mode(mode: str) -> bool:
    """Return whether this version knows the mode."""
    return mode in _MATCHED


def is_matched(mode: str) -> str:
    """Return SQL that says whether an event is in the replay; wants `asked_at` and, for again, `replay`."""
    return _MATCHED[mode]


def is_finished(mode: str) -> str:
    """Return SQL that says whether nothing is left to do: acted on, or in `deliveries`."""
    return _SETTLED[mode]
