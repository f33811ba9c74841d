"""Nonsense in Redis where relay and consumers keep what they need: by somebody who can write there. Neither ends."""

import pytest

from dovecote.relay.fence import RedisFence
from tests.security.attacked import Attacked, attacked

__all__ = ["attacked"]


@pytest.mark.servers
@pytest.mark.parametrize(
    "names",
    [
        ["test"],
        ["test.msgs"],
        [
            "test.XQ",
            "test.XQ.msgs",
            "test.in_flight",
            "test.crashes",
            "test.DQ",
            "test.DQ.msgs",
            "test.held.test.note",
        ],
        ["__relay__", "__relay__.history", "__heartbeats__"],
    ],
    ids=["the queue", "its messages", "the rest of it", "the relay's and the workers'"],
)
def test_a_key_of_another_type_stops_nobody_for_long(attacked: Attacked, names: list[str]) -> None:
    for name in names:
        attacked.redis.delete(f"{attacked.prefix}{name}")
        attacked.redis.geoadd(f"{attacked.prefix}{name}", [1, 1, "x"])
        if name in ("test.XQ", "__heartbeats__"):
            attacked.redis.delete(f"{attacked.prefix}{name}")
            attacked.redis.set(f"{attacked.prefix}{name}", "x")

    attacked.honest_event_is_acted_on(within_seconds=20)

    attacked.honest_event_is_acted_on(within_seconds=20)


@pytest.mark.servers
@pytest.mark.parametrize(
    "epoch", [b"", b"x", b"\xff", b"nan", b"inf", b"-5", b"9" * 100_000, b"1e300", str(2**62).encode()]
)
def test_a_hand_made_epoch_ends_no_relay(attacked: Attacked, epoch: bytes) -> None:
    attacked.redis.set(f"{attacked.prefix}__relay__", epoch)

    attacked.honest_event_is_acted_on(within_seconds=20)


@pytest.mark.servers
@pytest.mark.parametrize("field", ["history", "instance", "heartbeat", "seen"])
@pytest.mark.parametrize("value", [b"\x00", b"\xff", b"9" * 100_000, b"1 1 " + b"9" * 30, b"nan"])
def test_nothing_that_stands_beside_it_does(attacked: Attacked, field: str, value: bytes) -> None:
    attacked.redis.hset(f"{attacked.prefix}__relay__.history", field, value)
    fence = RedisFence(attacked.system.publisher).read()
    assert fence.instance == "" or field != "instance"

    attacked.honest_event_is_acted_on(within_seconds=20)
