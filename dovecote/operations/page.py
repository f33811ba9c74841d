"""One page of a listing, and the cursor that leads to the next one."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dovecote.operations.validation import BadCursor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Page(Generic[Item]):
    """Items, and the cursor of the next page; None at the end."""

    items: list[Item]
    next: str | None

    @classmethod
    def of(cls, found: Sequence[Item], limit: int, key: Callable[[Item], Sequence[object]]) -> "Page[Item]":
        """Return the first `limit` of what was found, which is one more where there is a next page.

        `key` returns what an item is ordered by; the cursor is made of the last one's.
        """
        return cls(list(found[:limit]), cursor(*key(found[limit - 1])) if len(found) > limit else None)


def cursor(*key: object) -> str:
    """Return the cursor of the page after this key."""
    return urlsafe_b64encode(json.dumps([str(part) for part in key]).encode()).decode().rstrip("=")


def read_cursor(given: str | None, *kinds: Callable[[str], Any], first: Sequence[Any]) -> Sequence[Any]:
    """Return the key of a cursor, each part read by its kind; `first` where none is given.

    Errors: BadCursor for what is no cursor of such a key.
    """
    if given is None:
        return first
    try:
        parts = json.loads(urlsafe_b64decode(given.encode("ascii") + b"=" * (-len(given) % 4)))
        if cursor(*parts) != given:
            raise ValueError
        return [kind(_text(part)) for kind, part in zip(kinds, parts, strict=True)]
    except (ValueError, TypeError, RecursionError):
        raise BadCursor(f"{given[:80]!r} is no cursor of this listing: give what the page before ended with") from None


def position(given: str) -> int:
    """Return the position that a cursor holds."""
    number = int(given)
    if not 0 <= number < 2**63:
        raise ValueError
    return number


def _text(part: object) -> str:
    """Return a text that Postgres takes."""
    if not isinstance(part, str) or "\0" in part:
        raise ValueError
    part.encode()  # no half of a surrogate pair
    return part
