"""What an event is, how it becomes JSON and back, and which events exist.

An event is a frozen dataclass that names its wire type, `<slice>.<event>.v<n>`. The name and the shape
of a version never change once they have been written; a new shape is a new version. Code knows the
class of the newest version only; an upcaster converts the payload of a version to that of the next.
"""

import json
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Self, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from dovecote.errors import InvalidEvent, UnknownEvent, shown, shown_error
from dovecote.events.ids import uuid7
from dovecote.events.money import Money
from dovecote.events.records import record
from dovecote.privacy import Keyring

type_name = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*\.v[1-9][0-9]*")
_aggregate_name = re.compile(r"[a-z][a-z0-9_]{0,62}")

Upcaster = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_registry: "dict[str, type[Event]]" = {}
# By the older type: the type right after it, and how to get there.
_upcasters: dict[str, tuple[str, Upcaster]] = {}


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that has happened to one aggregate.

        @dataclass(frozen=True, kw_only=True)
        class PriceQuoted(Event, type="pricing.price_quoted.v1", aggregate="price", key="symbol"):
            symbol: str

    `key` names the field that identifies the aggregate. A sensitive field is marked:
    `note: str = sensitive()`. It is encrypted in the row and decrypted by the consumer.
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
            raise InvalidEvent(f"{cls.__name__}: type {type!r} is not <slice>.<event>.v<n>")
        if not _aggregate_name.fullmatch(aggregate):
            raise InvalidEvent(f"{cls.__name__}: aggregate {aggregate!r} is not a lower-case word")
        if (known := _registry.get(type)) and known.__qualname__ != cls.__qualname__:
            raise InvalidEvent(f"{cls.__name__}: type {type!r} already belongs to {known.__name__}")
        cls.type, cls.aggregate_type, cls._key = type, aggregate, key
        _registry[type] = cls

    @property
    def aggregate_id(self) -> str:
        return str(getattr(self, self._key))

    def payload(self, keys: Keyring | None = None) -> dict[str, Any]:
        """Return the event as a flat JSON object: ids, decimals and times as text, Money as an object.

        Sensitive fields are {"encrypted": text}.
        Errors: InvalidEvent when there are such fields and no keys.
        """
        fields = {}
        for name, codec in _codecs(self.__class__).items():
            value = codec.encode(getattr(self, name))
            fields[name] = self._encrypted(name, value, keys) if codec.sensitive else value
        return fields

    @classmethod
    def from_payload(cls, event_id: UUID, payload: Mapping[str, Any], keys: Keyring | None = None) -> Self:
        """Read an event back. Fields this version does not know are ignored: newer writers may add some.

        Errors: InvalidEvent naming the field that is missing or wrong, or encrypted while there are no keys;
                CannotDecrypt when it is encrypted with another key.
        """
        values: dict[str, Any] = {"event_id": event_id}
        for name, codec in _codecs(cls).items():
            value = payload.get(name)
            if codec.sensitive:
                value = cls._decrypted(event_id, name, value, keys)
            try:
                values[name] = codec.decode(value)
            except (ValueError, TypeError, KeyError, ArithmeticError) as error:
                why = "its content does not fit" if codec.sensitive else shown_error(error)
                raise InvalidEvent(f"{cls.type} {event_id}: field {name!r} cannot be read: {why}") from None
        return record(cls, values)

    def _encrypted(self, name: str, value: Any, keys: Keyring | None) -> dict[str, str]:
        if keys is None:
            raise InvalidEvent(f"{self.type}: field {name!r} is sensitive; give the unit of work its keys")
        # Bound to its place: an encrypted field that is copied into another event is not decrypted there.
        return {"encrypted": keys.encrypt(json.dumps(value), context=f"{self.event_id}/{name}")}

    @classmethod
    def _decrypted(cls, event_id: UUID, name: str, value: Any, keys: Keyring | None) -> Any:
        if keys is None or not isinstance(value, dict) or not isinstance(value.get("encrypted"), str):
            why = "there are no keys to decrypt it" if keys is None else "it is not encrypted"
            raise InvalidEvent(f"{cls.type} {event_id}: field {name!r} is sensitive and {why}")
        return json.loads(keys.decrypt(value["encrypted"], context=f"{event_id}/{name}"))


def sensitive() -> Any:
    """Mark a field of an event: it leaves encrypted and never shows in a repr."""
    return field(metadata={"sensitive": True}, repr=False)


def upcaster(older: str, newer: str) -> Callable[[Upcaster], Upcaster]:
    """Register a pure function from the payload of one version to that of the next.

        @upcaster("shop.order_placed.v1", "shop.order_placed.v2")
        def _with_currency(payload: Mapping[str, Any]) -> dict[str, Any]:
            return {**payload, "currency": "EUR"}

    An encrypted field may stay or go, but not get another name: it is encrypted for that name.
    Errors: InvalidEvent unless the two are neighbouring versions of one event, or when there is one already.
    """
    name, version = versioned(older)
    if versioned(newer) != (name, version + 1):
        raise InvalidEvent(f"an upcaster leads to the next version of the same event, not from {older} to {newer}")

    def register(upcast_one: Upcaster) -> Upcaster:
        known = _upcasters.get(older)
        if known is not None and known[1].__qualname__ != upcast_one.__qualname__:
            raise InvalidEvent(f"{older} has an upcaster already: {known[1].__qualname__}")
        _upcasters[older] = newer, upcast_one
        return upcast_one

    return register


def versioned(type: str) -> tuple[str, int]:
    """Return the name and the version of a wire type: `shop.order_placed` and 2.

    Errors: InvalidEvent when it is no wire type.
    """
    if not type_name.fullmatch(type):
        raise InvalidEvent(f"type {type!r} is not <slice>.<event>.v<n>")
    name, _, version = type.rpartition(".v")
    return name, int(version)


def has_sensitive_fields(event_class: type[Event]) -> bool:
    """Return whether events of this class can be written and read with keys only."""
    return any(codec.sensitive for codec in _codecs(event_class).values())


def readable_as(event_class: type[Event]) -> list[str]:
    """Return the wire types that are read as this class: its own, and the older versions of it, newest first."""
    types = [event_class.type]
    older = {newer: older for older, (newer, _) in _upcasters.items()}
    while types[-1] in older:
        types.append(older[types[-1]])
    return types


def upcast(type: str, payload: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the newest type that this one leads to, and the payload in its shape."""
    while type in _upcasters:
        type, step = _upcasters[type]
        payload = step(payload)
    return type, payload


def read_event(type: str, event_id: UUID, payload: Mapping[str, Any], keys: Keyring | None = None) -> Event:
    """Return the event that a row or an envelope holds, as the newest version of it.

    Errors: UnknownEvent when no class has that type; InvalidEvent when the payload does not fit it;
            CannotDecrypt when a sensitive field was encrypted with a key that is not among these.
    """
    try:
        newest, payload = upcast(type, payload) if type in _upcasters else (type, payload)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise InvalidEvent(f"{type} {event_id}: its payload is not of that version: {shown_error(error)}") from None
    try:
        event_class = _registry[newest]
    except KeyError:
        raise UnknownEvent(f"event {event_id} has the unknown type {shown(type)}") from None
    return event_class.from_payload(event_id, payload, keys)


def known_events() -> Mapping[str, type[Event]]:
    """Return every event class that has been imported, by wire type."""
    return types.MappingProxyType(_registry)


class _Codec(NamedTuple):
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    sensitive: bool


_codecs_of: dict[type[Event], dict[str, _Codec]] = {}


def _codecs(event_class: type[Event]) -> dict[str, _Codec]:
    # Not in __init_subclass__: the fields are there only after the dataclass decorator has run.
    if event_class not in _codecs_of:
        hints = get_type_hints(event_class)
        codecs = {
            f.name: _Codec(*_codec(hints[f.name]), sensitive=f.metadata.get("sensitive", False))
            for f in fields(event_class)
            if f.name != "event_id"
        }
        key = event_class._key
        if codecs[key].sensitive:
            raise InvalidEvent(f"{event_class.__name__}: {key!r} names the aggregate and cannot be sensitive")
        _codecs_of[event_class] = codecs
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
        return str, _uuid
    if hint is datetime:
        return _time_text, _time
    if hint is Money:
        return (
            lambda money: {"amount_minor": money.amount_minor, "currency": money.currency},
            _money,
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return (lambda value: value.value), _member_of(hint)
    raise InvalidEvent(f"an event field cannot be {hint}; see Event")


def _as_it_is(value: Any) -> Any:
    return value


def _expect(wanted: type) -> Callable[[Any], Any]:
    def decode(value: Any) -> Any:
        if type(value) is not wanted:
            raise ValueError(f"expected {wanted.__name__}, got {shown(value)}")
        return value

    return decode


def _decimal(value: Any) -> Decimal:
    if not isinstance(value, str):
        raise ValueError(f"expected a decimal as text, got {shown(value)}")
    try:
        return Decimal(value)
    except InvalidOperation:
        raise ValueError(f"expected a decimal as text, got {shown(value)}") from None


def _uuid(value: Any) -> UUID:
    try:
        return UUID(value)
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"expected a UUID as text, got {shown(value)}") from None


def _money(value: Any) -> Money:
    if not isinstance(value, dict):
        raise ValueError(f"expected an amount and its currency, got {shown(value)}")
    return Money(value["amount_minor"], value["currency"])


def _member_of(choices: type[Enum]) -> Callable[[Any], Enum]:
    def decode(value: Any) -> Enum:
        try:
            return choices(value)
        except (ValueError, TypeError, RecursionError):
            # Enum's own message holds the whole value.
            names = ", ".join(str(choice.value) for choice in choices)
            raise ValueError(f"expected one of {names}, got {shown(value)}") from None

    return decode


def _time_text(time: datetime) -> str:
    if time.tzinfo is None:
        raise InvalidEvent(f"a time needs a time zone, got {shown(time)}")
    return time.astimezone(UTC).isoformat()


def _time(value: Any) -> datetime:
    try:
        time = datetime.fromisoformat(value)
    except (ValueError, TypeError):
        raise ValueError(f"expected a time in ISO 8601, got {shown(value)}") from None
    if time.tzinfo is None:
        raise ValueError(f"a time needs a time zone, got {shown(value)}")
    return time
