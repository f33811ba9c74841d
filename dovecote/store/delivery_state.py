"""The states of a row in `deliveries`."""

from enum import StrEnum


class DeliveryState(StrEnum):
    """What becomes of an event that a handler has not acted on at the first try.

    The constraint `deliveries_state_is_known` knows the same values (tests/dovecote/store/test_delivery_state.py).
    """

    #: It failed and is tried again at `next_attempt_at`.
    RETRYING = "retrying"
    #: It waits for an earlier event of its aggregate, whose handler is ordered.
    WAITING = "waiting"
    #: It has failed for good, until an operator retries or discards it.
    DEAD = "dead"
    #: An operator has given it up.
    DISCARDED = "discarded"
