"""UUIDv7: ids that sort by the time they were made. Outbox and dedup are partitioned by them."""

import os
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

_VERSION_7 = 7 << 76
_VARIANT_RFC = 2 << 62
_RANDOM_A = 0xFFF << 64
_RANDOM_B = (1 << 62) - 1


def _uuid7() -> UUID:
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    return UUID(int=milliseconds << 80 | _VERSION_7 | random & _RANDOM_A | _VARIANT_RFC | random & _RANDOM_B)


#: Return a new id: 48 bits of Unix milliseconds, then a counter and random bits (RFC 9562, section 5.7).
uuid7: Callable[[], UUID] = getattr(uuid, "uuid7", _uuid7)  # in the standard library from Python 3.14


def made_at(id: UUID) -> datetime:
    """Return when a UUIDv7 was made, to the millisecond.

    Errors: ValueError for any other version of UUID.
    """
    if id.version != 7:
        raise ValueError(f"{id} is not a UUIDv7")
    return datetime.fromtimestamp((id.int >> 80) / 1000, UTC)
