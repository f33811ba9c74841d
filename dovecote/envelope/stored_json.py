"""JSON as Postgres keeps it, which is more than Python's parser takes: numbers of 100,000 digits, a thousand brackets.

For commands that show it. Consumers read a payload with orjson, which refuses such values (envelope/__init__.py).
"""

import json
import math
from typing import Any

from dovecote.errors import shown

# Digits of a number that is shown as one. Python writes no longer ones than 4,300, and JSON for machines seldom 20.
_MAX_DIGITS = 300


def read_stored(text: str | bytes) -> Any:
    """Return the value of JSON; numbers that Python cannot show become text, and so does what it cannot read."""
    try:
        return json.loads(text, parse_int=_whole, parse_float=_float)
    except (ValueError, RecursionError) as error:
        return {"unreadable": f"{type(error).__name__}: {shown(text)}, {len(text)} characters"}


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_DIGITS else _short(digits)


def _float(digits: str) -> float | str:
    value = float(digits)
    return value if math.isfinite(value) else _short(digits)


def _short(digits: str) -> str:
    return f"{digits[:40]}... ({len(digits)} digits)"
