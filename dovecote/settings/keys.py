"""Is a key one that somebody made by hand, or used twice? Random keys are neither."""

import base64
from collections.abc import Iterator, Mapping
from itertools import pairwise

# Of 32 random bytes fewer than 16 different ones, or differences, or 30 printable ones, are met once in 10**9 keys at
# most, by far.
_MIN_DIFFERENT, _MAX_PRINTABLE = 16, 29
_LONGEST_PERIOD = 16

CURE = "make it with openssl rand -base64 32"


def named_keys(variable: str, text: str) -> Iterator[tuple[str, bytes]]:
    """Yield each key of an option that was found to be well-formed, with a name for messages.

    The text is a key in base64, or `id:base64` pairs with commas between.
    """
    for part in text.split(","):
        key_id, colon, encoded = part.strip().rpartition(":")
        yield (f"key {key_id} of {variable}" if colon else variable), base64.b64decode(encoded)


def weakness(key: bytes) -> str | None:
    """Return what is wrong with the key, as in "it ...", None for nothing."""
    for period in range(1, _LONGEST_PERIOD + 1):
        if all(byte == key[place % period] for place, byte in enumerate(key)):
            return "is one byte repeated" if period == 1 else f"repeats itself after {period} bytes"
    if sum(0x20 <= byte < 0x7F for byte in key) > _MAX_PRINTABLE:
        return "is a text in base64 and not random"
    steps = {(after - before) % 256 for before, after in pairwise(key)}
    if len({*key}) < _MIN_DIFFERENT or len(steps) < _MIN_DIFFERENT:
        return "is a pattern and not random"
    return None


def equal_keys(given: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the names of two keys that are the same; `given` are well-formed ones by their variables."""
    seen: dict[bytes, str] = {}
    for variable, text in given.items():
        for name, key in named_keys(variable, text):
            if key in seen:
                return seen[key], name
            seen[key] = name
    return None


def spellings(key: str) -> Iterator[str]:
    """Yield a key in base64 as it may turn up in a text: as given, and its bytes as Python and others show them."""
    raw = base64.b64decode(key)
    yield from {key, base64.urlsafe_b64encode(raw).decode(), raw.hex(), repr(raw)[2:-1]}
