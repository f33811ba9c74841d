"""What an event is, how it becomes JSON and back, and which events exist.

An event is a frozen dataclass that names its wire type, `<slice>.<fact>.v<n>`. The name and the shape
of a version never change once they have been written; a new shape is a new version.
"""

import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from domain.errors import InvalidEvent, UnknownEvent
from domain.ids import uuid7
from domain.money import Money

type_name = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*\.v[1-9][0-9]*")
_aggregate_name = re.compile(r"[a-z][a-z0-9_]{0,62}")

_registry: "dict[str, type[Event]]" = {}


@dataclass(frozen=True, kw_only=True)
class Event:
    """A fact about one aggregate.

        @dataclass(frozen=True, kw_only=True)
        class PriceQuoted(Event, type="pricing.price_quoted.v1", aggregate="price", key="symbol"):
            symbol: str

    `key` names the field that identifies the aggregate.
    Fields may be str, int, bool, Decimal, datetime (aware), UUID, Enum, Money, or None-able ones of these.
    """

    event_id: UUID = field(default_factory=uuid7)
    occurred_at: datetime

    type: ClassVar[str]
    aggregate_type: ClassVar[str]
    _key: ClassVar[str]

    def __init_subclass__(cls, *, type: str, aggregate: str, key: str) -> None:
        super().__init_subclass__()
        if not type_name.fullmatch(type):
            raise InvalidEvent(f"{cls.__name__}: type {type!r} is not <slice>.<fact>.v<n>")
        if not _aggregate_name.fullmatch(aggregate):
            raise InvalidEvent(f"{cls.__name__}: aggregate {aggregate!r} is not a lower-case word")
        if (known := _registry.get(type)) and known.__qualname__ != cls.__qualname__:
            raise InvalidEvent(f"{cls.__name__}: type {type!r} already belongs to {known.__name__}")
        cls.type, cls.aggregate_type, cls._key = type, aggregate, key
        _registry[type] = cls

    @property
    def aggregate_id(self) -> str:
        return str(getattr(self, self._key))

    def payload(self) -> dict[str, Any]:
        """Return the event as a flat JSON object: ids, decimals and moments as text, Money as an object."""
        return {name: encode(getattr(self, name)) for name, encode, _ in _codecs(self.__class__)}

    @classmethod
    def from_payload(cls, event_id: UUID, payload: Mapping[str, Any]) -> Self:
        """Read an event back. Fields this version does not know are ignored: newer writers may add some.

        Errors: InvalidEvent naming the field that is missing or wrong.
        """
        values: dict[str, Any] = {}
        for name, _, decode in _codecs(cls):
            try:
                values[name] = decode(payload.get(name))
            except (ValueError, TypeError, KeyError, ArithmeticError) as error:
                raise InvalidEvent(f"{cls.type} {event_id}: field {name!r} cannot be read: {error}") from error
        return cls(event_id=event_id, **values)


def read_event(type: str, event_id: UUID, payload: Mapping[str, Any]) -> Event:
    """Return the event that a row or an envelope holds.

    Errors: UnknownEvent when no class has that type; InvalidEvent when the payload does not fit it.
    """
    try:
        event_class = _registry[type]
    except KeyError:
        raise UnknownEvent(f"event {event_id} has the unknown type {type!r}") from None
    return event_class.from_payload(event_id, payload)


def known_events() -> Mapping[str, type[Event]]:
    """Return every event class that has been imported, by wire type."""
    return types.MappingProxyType(_registry)


Codec = tuple[str, Callable[[Any], Any], Callable[[Any], Any]]


_codecs_of: dict[type[Event], tuple[Codec, ...]] = {}


def _codecs(event_class: type[Event]) -> tuple[Codec, ...]:
    # Not in __init_subclass__: the fields are there only after the dataclass decorator has run.
    if event_class not in _codecs_of:
        hints = get_type_hints(event_class)
        _codecs_of[event_class] = tuple(
            (f.name, *_codec(hints[f.name])) for f in fields(event_class) if f.name != "event_id"
        )
    return _codecs_of[event_class]


def _codec(hint: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (arm for arm in get_args(hint) if arm is not type(None))
        encode, decode = _codec(inner)
        return (
            lambda value: None if value is None else encode(value),
            lambda value: None if value is None else decode(value),
        )
    if hint in (str, int, bool):
        return _as_it_is, _expect(hint)
    if hint is Decimal:
        return str, _decimal
    if hint is UUID:
        return str, UUID
    if hint is datetime:
        return _moment_text, _moment
    if hint is Money:
        return (
            lambda money: {"amount_minor": money.amount_minor, "currency": money.currency},
            lambda value: Money(value["amount_minor"], value["currency"]),
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return (lambda value: value.value), hint
    raise InvalidEvent(f"an event field cannot be {hint}; see Event")


def _as_it_is(value: Any) -> Any:
    return value


def _expect(wanted: type) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if type(value) is not wanted:
            raise ValueError(f"expected {wanted.__name__}, got {value!r}")
        return value

    return decode


def _decimal(value: Any) -> Decimal:
    if not isinstance(value, str):
        raise ValueError(f"expected a decimal as text, got {value!r}")
    return Decimal(value)


def _moment_text(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise InvalidEvent(f"a moment needs a time zone, got {moment!r}")
    return moment.astimezone(UTC).isoformat()


def _moment(value: Any) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError(f"a moment needs a time zone, got {value!r}")
    return moment
